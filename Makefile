# Every target works in a new checkout: it creates the environment, installs, compiles and runs; a second run reuses
# these results. `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# An existing environment (VENV=...) keeps its torch.
TORCH ?= $(if $(filter .venv,$(VENV)),torch==2.14.1 torchvision==0.29.1,torch torchvision)
OTHER_TORCH ?= torch==2.13.0
OLD_TRITON := triton==3.6.0
RUFF := ruff==0.17.6
MYPY := mypy==2.4.1
DOCS := mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 $(RUFF)
SHARDS = $(shell nproc)
CUDA_HOME ?= /usr/local/cuda

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMPS := $(VENV)/.lfcc
OLD_TRITON_AT := $(VENV)/.triton
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo demo-ddp test test-slow test-full lint docs bench gpu wheel check-wheel clean force
.DELETE_ON_ERROR:

help:
	@echo "make TARGET, with PYTHON=, VENV= or TORCH= to change the defaults:"
	@sed -n 's/^\([a-z-]*\):.*## /  \1	/p' Makefile | expand -t 16

demo: $(STAMPS)/demo ## train a small ViT with a CNN teacher on CIFAR-10; DATA=folder reads CIFAR-10 from there
	$(BIN)/python examples/cifar10/few_labels.py $(if $(DATA),--data '$(DATA)')

demo-ddp: $(STAMPS)/demo ## train it in one process and in two that split each batch, and compare the losses
	$(BIN)/python examples/cifar10/two_processes.py $(if $(DATA),--data '$(DATA)')

# Tests of the offline compilation run in parallel themselves, and print their tables from one process.
PYTEST := $(BIN)/python -m pytest
IN_PARALLEL := -n auto --dist loadgroup --ignore tests/offline
WITH_OLD_TRITON := PYTHONPATH=$(OLD_TRITON_AT) $(PYTEST)
# Compiles the kernels, and the CUDA kernels for their emulation on the CPU, while packages are downloaded.
PREPARE := @$(MAKE) --no-print-directory -j 2

test: ## run the tests that every change must pass, some minutes
	$(PREPARE) $(STAMPS)/test $(STAMPS)/emulation
	$(PYTEST) $(IN_PARALLEL) -m 'not slow'

test-slow: ## run the other tests: sanitizers, many ranks, recipes, wheels, compilation for GPUs, the oldest Triton
	$(PREPARE) $(STAMPS)/test $(STAMPS)/emulation $(STAMPS)/triton
	$(PYTEST) $(IN_PARALLEL) -m slow
	$(PYTEST) tests/offline
	@echo "== the Triton kernels with $(OLD_TRITON)"
	$(WITH_OLD_TRITON) -n auto -k triton tests/test_info_nce_foreach.py tests/test_ops.py
	$(WITH_OLD_TRITON) tests/offline/test_offline_compile.py

test-full: ## run all tests, on the full product of every grid and in all schedules
	$(PREPARE) $(STAMPS)/test $(STAMPS)/emulation
	$(PYTEST) $(IN_PARALLEL) --full
	$(PYTEST) tests/offline

lint: $(STAMPS)/lint $(STAMPS)/torch ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMPS)/docs ## build the documentation in build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/mkdocs build --strict

bench: $(STAMPS)/bench $(STAMPS)/peers ## benchmark the kernels against other implementations, half an hour
	$(BIN)/lfcc bench

# Uses the packages of PYTHON and downloads nothing. A failure, or tests that run for more than four minutes, do not stop
# the rest. Under compute-sanitizer torch caches no memory, because the cache would hide accesses past the end of a
# tensor; errors of the CUDA API are ignored, because torch causes some when it searches for driver functions.
gpu: ## build, test and measure on an NVIDIA GPU with the packages of PYTHON: torch, ninja, pybind11, pytest
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and f"make gpu: torch {torch.__version__} of $(PYTHON) sees no NVIDIA GPU")'
	@failed=; export PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH}; \
	echo "== building"; $(PYTHON) setup.py --quiet build_ext --inplace || failed="$$failed build"; \
	echo "== tests, in $(SHARDS) processes"; mkdir -p build; rm -f build/gpu-tests-*; \
	for n in $$(seq $(SHARDS)); do (LFCC_TEST_SHARD=$$n/$(SHARDS) timeout -s INT -k 20 240 $(PYTHON) -m pytest -m gpu \
		--tb=short --ignore tests/distill --ignore tests/bench --ignore tests/offline tests > build/gpu-tests-$$n.log 2>&1 && mv build/gpu-tests-$$n.log build/gpu-tests-$$n.passed) & done; wait; \
	tail -q -n 1 build/gpu-tests-*.passed; \
	if ls build/gpu-tests-*.log > /dev/null 2>&1; then tail -n 60 build/gpu-tests-*.log; failed="$$failed tests"; fi; \
	sanitizer=$$(PATH=$$PATH:$(CUDA_HOME)/bin command -v compute-sanitizer) || echo "== compute-sanitizer is not installed"; \
	for tool in $${sanitizer:+memcheck racecheck}; do echo "== the CUDA kernels under $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 20 100 $$sanitizer --tool $$tool --target-processes all \
		--report-api-errors no --error-exitcode 1 $(PYTHON) -m pytest -m gpu -k 'opcheck and cuda' tests/test_ops.py || failed="$$failed $$tool"; done; \
	echo "== benchmarks"; $(PYTHON) -m lfcc_kernels.cli bench --device cuda --minutes 4 || failed="$$failed benchmarks"; \
	if [ "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi

wheel: $(STAMPS)/torch ## build a wheel for every Python and torch 2.11 to 2.14 into dist/
	@echo "== building the wheel"
	@rm -rf build/lib* dist
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

check-wheel: wheel ## test that wheel in a second environment with OTHER_TORCH
	@echo "== a second environment, build/other, with $(OTHER_TORCH)"
	@$(PYTHON) -m venv --clear build/other
	@build/other/bin/python -m pip -qq --disable-pip-version-check install $(OTHER_TORCH) numpy scipy pytest
	@build/other/bin/python -m pip -qq --disable-pip-version-check install --no-deps dist/*.whl
	@cp -r tests pyproject.toml build/other
	cd build/other && bin/lfcc info && bin/pytest tests/test_lowpass.py tests/test_info_nce.py

clean: ## remove the results of builds; `rm -rf .venv` removes the environment
	rm -rf build dist *.egg-info lfcc_kernels/*.so .pytest_cache .ruff_cache $(STAMPS)/built $(STAMPS)/emulation

$(BIN)/pip:
	@echo "== environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/lint: Makefile | $(BIN)/pip
	@echo "== installing $(RUFF) $(MYPY)"
	@$(PIP) install $(RUFF) $(MYPY)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/docs: Makefile | $(BIN)/pip
	@echo "== installing mkdocs-material and mkdocstrings"
	@$(PIP) install $(DOCS)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requested: force | $(BIN)/pip
	@mkdir -p $(STAMPS) && echo '$(TORCH)' | cmp --silent - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/requested
	@echo "== installing $(TORCH) and the build tools (a large download, some minutes)"
	@$(PIP) install $(TORCH) numpy 'setuptools>=77' wheel ninja 'pybind11>=2.13'
	@touch $@

# Without a compiler the stamp is not written, so that the next run tries again.
$(STAMPS)/built: $(SOURCES) $(STAMPS)/torch
	@echo "== compiling and installing lfcc_kernels (a minute or two, less when little of csrc/ changed)"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@if ls lfcc_kernels/_C.*so > /dev/null 2>&1; then touch $@; else \
		echo "== no C++ compiler: kernels were not built, everything runs on the eager backend (install g++)"; fi

$(STAMPS)/emulation: $(SOURCES) tests/emulation/build.py $(wildcard tests/emulation/*.h) $(STAMPS)/torch
	@echo "== compiling the CUDA kernels for their emulation, also with sanitizers"
	@$(BIN)/python tests/emulation/build.py && $(BIN)/python tests/emulation/build.py --sanitize
	@touch $@

# In a separate folder, because the environment has its own Triton; with the newest numpy that its interpreter supports.
$(STAMPS)/triton: Makefile $(STAMPS)/torch
	@echo "== installing $(OLD_TRITON)"
	@$(PIP) install --no-deps --upgrade --target $(OLD_TRITON_AT) $(OLD_TRITON) 'numpy<2.4'
	@touch $@

# The package is already installed, so this installs only the packages of the extra.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/peers: $(STAMPS)/%: pyproject.toml $(STAMPS)/torch | $(STAMPS)/built
	@echo "== installing the packages of lfcc-kernels[$*]"
	@$(PIP) install 'lfcc-kernels[$*]'
	@touch $@
