# Every target sets up what it needs on a bare clone: a virtual environment in .venv, and this package in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

FIRST ?= runs/first
PROCESSES ?= 2
# A CPU that multiplies in bfloat16 trains nearly twice as fast in it; FLAGS= trains in float32.
FLAGS ?= $(shell if ! command -v nvidia-smi > /dev/null && grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then \
	echo --dtype bfloat16; fi)
MINUTES ?= 10
JOBS ?= 2

.PHONY: sample train test check format bench gpu clean

sample: $(VENV)/.installed
	$(BIN)/python sample.py --out outputs --annotate

# From an early adapter that knows what and begins to know where, until places are learnt. Stopped at any time, it goes on when
# called again; FIRST=DIR puts the run elsewhere, PROCESSES=N trains with another number of cores (or GPUs).
train: $(VENV)/.installed-results
	$(BIN)/torchrun --nproc-per-node $(PROCESSES) train.py scenes-first --out $(FIRST) \
		--adapter checkpoints/scenes-early-box-text.safetensors $(FLAGS)
	$(BIN)/python -m gligen.training.report $(FIRST)

# JOBS=N: that many files of tests at a time, each with one thread.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Small on a CPU, full size with CUDA; adds rows to benchmarks/rows and writes docs/performance.md from them.
bench: $(VENV)/.installed-results
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.sample
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.render

# Checks and figures of a GPU, the most important first; stopped at any time, it goes on where it was. MINUTES=N ends it.
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES)
	$(BIN)/python -m benchmarks.gpu --list

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .[dev]
	touch $@

$(VENV)/.installed-results: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .[results]
	touch $@

clean:
	rm -rf $(VENV) outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache
