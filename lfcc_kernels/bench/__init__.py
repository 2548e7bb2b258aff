"""`lfcc bench`: benchmarks of the kernels and the loss against other implementations on this machine.

cases/ defines the cases and their least work, peers/ the other implementations, targets.py the bounds to reach.
runner.py measures the cases in a child process, harness.py the candidates of a case in turn; machine/ has the clocks,
ceilings and memory of a CPU and of a GPU. record.py defines the record, which tables.py, plots.py, report.py,
compare.py and dispatch.py read. explain.py breaks down the time of one case, tune/ tunes the Triton kernels.
"""
