"""`lfcc bench`: the kernels and the loss against their peers, on the machine it runs on.

cases/ says what is measured and what it must cost, peers/ against whom, goals.py what is to be reached; harness.py lets
the candidates of a case run in turn, runner.py goes through the cases in a child process; machine/ has the clock, the
ceilings and the memory of a CPU and of a GPU; record.py is the format of the results, and tables.py, page.py,
compare.py, explain.py and dispatch.py are what is made of them.
"""
