"""The benchmarks are tested in their smallest form, which is chosen before they are imported."""

import os

os.environ["LFCC_BENCH_SIZE"] = "tiny"
