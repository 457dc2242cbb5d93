# Every target starts from a clean clone: it makes the environment first if it is not there.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
# One OpenMP thread per test process: the suite is many small tensors on two processes.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

# The Triton of torch 2.11's wheels, older than the pinned one: the kernels must work with both. Its
# interpreter wants the NumPy of its time: from 2.4 on, int() of an array of one entry is an error.
TRITON_OLD     := 3.6.0
NUMPY_OLD      := 2.3.5
TRITON_OLD_DIR ?= $(VENV)/triton-$(TRITON_OLD)
TRITON_TESTS    = tests/kernels/test_sm90.py $(wildcard tests/ops/test_triton*.py)

BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f -not -name '*.pyc')

.PHONY: help venv build test test-slow test-peft test-triton36 test-gpu sm90-shipped sm90 cuda-sm90 sanitize demo \
	aurora-digits-retrieval aurora-digits-vqa crome-digits bench bench-overhead bench-gpu bench-gpu-subset \
	bench-gpu-all performance lint format clean

help:
	@echo "make demo | aurora-digits-retrieval | aurora-digits-vqa | crome-digits |"
	@echo "     test | test-slow | test-peft | test-triton36 | test-gpu | sm90 | cuda-sm90 | sanitize |"
	@echo "     bench | bench-overhead | bench-gpu | bench-gpu-subset | bench-gpu-all | performance |"
	@echo "     lint | format | build | venv | clean"

$(VENV)/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmadapt needs Python 3.11 or newer; set PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

venv: $(VENV)/.installed

build: venv
	$(PIP) install --no-build-isolation --no-deps -e .
	$(PY) -c 'import mmadapt; mmadapt.show_config()'

test: venv
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-slow: venv
	$(PYTEST) -m "slow and not gpu"

test-peft: venv
	OMP_NUM_THREADS=1 $(PY) tests/peft_suite/run.py -n 2

$(TRITON_OLD_DIR): | venv
	rm -rf $@.part
	$(PIP) install --no-deps --target $@.part triton==$(TRITON_OLD) numpy==$(NUMPY_OLD)
	mv $@.part $@

test-triton36: venv $(TRITON_OLD_DIR)
	PYTHONPATH=$(TRITON_OLD_DIR) $(PY) -c 'import triton; assert triton.__version__ == "$(TRITON_OLD)"'
	PYTHONPATH=$(TRITON_OLD_DIR) $(PYTEST) -n 2 -m "not slow and not gpu" $(TRITON_TESTS)

# Registers, stack and shared memory of every kernel on sm_90, compiled here without a GPU: in every
# shipped setting, and for the wide matrix of shapes.
sm90-shipped: venv
	OMP_NUM_THREADS=1 $(PY) -W ignore tests/kernels/sm90.py --shipped

sm90: venv
	OMP_NUM_THREADS=1 $(PY) -W ignore tests/kernels/sm90.py --slow

# Registers, stack and wgmma of every CUDA kernel, compiled here without a GPU; needs nvcc.
cuda-sm90: venv
	$(PY) tests/cuda/sm90.py

# What needs a GPU, on one.
test-gpu: venv
	$(PYTEST) -n 4 -m gpu

# Every CUDA kernel under compute-sanitizer; needs a GPU and the CUDA toolkit. Without torch's cache
# every tensor is an allocation of its own, so that an access past its end is one past memory. Minutes a
# tool; SANITIZE=--quick takes every fifth problem.
sanitize: venv
	for tool in memcheck racecheck initcheck synccheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PY) -m tests.cuda.sanitize $(SANITIZE) || exit 1; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PY) -m tests.cuda.sanitize --portable $(SANITIZE) swiglu_adapter || exit 1; done

demo: venv
	$(VENV)/bin/mmadapt demo

# Full fine-tuning, LoRA and Aurora side by side on digit scans: minutes on two cores, offline.
aurora-digits-retrieval: venv
	$(VENV)/bin/mmadapt train aurora_digits_retrieval

aurora-digits-vqa: venv
	$(VENV)/bin/mmadapt train aurora_digits_vqa
crome-digits: venv
	$(VENV)/bin/mmadapt train crome_digits

bench: venv
	$(PY) -m bench

# Host time of a call against the committed baseline.
bench-overhead: venv
	$(PY) -m pytest -p no:xdist bench/test_overhead.py

bench-gpu: venv
	$(PY) -m bench.run goals

# The subset that fits into a quarter of an hour, in the order of bench/README.md. What fails does
# not keep the rest from running; the last line tells.
bench-gpu-subset: venv
	PY=$(PY) sh bench/gpu.sh subset

bench-gpu-all: venv
	PY=$(PY) sh bench/gpu.sh all

performance: venv
	$(PY) docs/update_performance.py
	$(PY) docs/update_readme.py

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)/.installed build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mmadapt kernels -name '*.so' -delete
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
