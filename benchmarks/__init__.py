"""Benchmarks of lfcc_kernels: `python -m benchmarks` measures, prints the table and writes a results file.

cases/ says what is measured and what it must cost, peers.py against whom, goals.py what is to be reached;
harness.py takes the times, machine.py the ceilings, memory.py the peaks; record.py is the format of the
results and report.py their tables. The test_*.py files are thin pytest-benchmark suites over the cases.
"""
