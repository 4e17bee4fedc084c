# make demo    trains a small language model with tensor and sequence parallelism; make test    everything CI runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: nccl-wheels demo test test-all test-jax check fuzz native sanitize aarch64 stress bench clean

demo: .venv/ready
	$(BIN)/python -m fcomm.demo $(ARGS)

# The standard table, into notes/. MPI takes part where Open MPI or MPICH is installed and mpi4py can be.
bench: .venv/ready
	-command -v mpirun > /dev/null && $(BIN)/pip install --quiet "mpi4py>=4"
	$(BIN)/python -m fcomm.bench.standard notes/0041-benchmark-table.md $(ARGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-all: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/ready
	$(BIN)/ruff format --check fcomm tests
	$(BIN)/ruff check fcomm tests
	$(BIN)/mypy

# random programs against plain torch, for as long as you like
MINUTES ?= 20
fuzz: .venv/ready
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

# random programs against jax.lax, which this installs
test-jax: .venv/ready
	$(BIN)/pip install --quiet --editable ".[test,jax]"
	$(BIN)/python -m pytest tests/test_jax.py

# the shared-memory engine, rebuilt in place; a failure is an error here, where pip goes on without it
native: .venv/ready
	rm -f fcomm/_native*.so
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -c "import fcomm._native"

# the engine's own tests under AddressSanitizer, UndefinedBehaviourSanitizer and ThreadSanitizer
sanitize: .venv/ready
	$(BIN)/python -m pytest tests/test_engine_native.py -k sanitizer

# the same for the other processor, emulated: needs g++-aarch64-linux-gnu and qemu-user
aarch64: .venv/ready
	command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64
	$(BIN)/python -m pytest tests/test_engine_native.py -k aarch64

# a million small collectives, and nothing of the process grows
stress: .venv/ready
	$(BIN)/python -m pytest tests/test_engine_native.py -k stress

# NVIDIA's own libraries of four versions, 300 MB each, through our tables; no GPU is needed
WHEELS ?= $(HOME)/.cache/fcomm/nccl-wheels
nccl-wheels: .venv/ready
	$(BIN)/python tests/nccl_wheels.py $(WHEELS)

# torch is pinned: a looser range would fetch a build with CUDA, which is gigabytes. Python compiles a module when it is
# first imported; compiling all of torch's here would take three times as long as copying them.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info fcomm/*.so
