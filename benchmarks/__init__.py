"""Benchmarks of lfcc_kernels: `python -m benchmarks` measures, prints the table and writes a results file.

cases/ says what is measured and what it must cost, peers.py and libraries.py against whom, goals.py what is to be
reached; harness.py lets the candidates of a case run in turn; machine/ has the clock, the ceilings and the memory
of a CPU and of a GPU; record.py is the format of the results and report.py their tables. On a CPU the test_*.py
files are thin pytest-benchmark suites over the cases; on a GPU (`--device cuda`) runner.py runs them.
"""
