# `make demo` and `make test` need Python >= 3.10, make and a C compiler: each sets up .venv first.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
EXTRA := gpu
else
BIN := $(VENV)/bin
# ONNX Runtime comes as one of two wheels; the GPU one also runs on the CPU, where it is built.
EXTRA := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),gpu,cpu)
endif

# The tests run side by side, so each one keeps to one thread.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: all venv demo test faults distributed fuzz check format clean

all: check test

venv: $(INSTALLED)

# torch first and alone: pip then takes the build that is at hand (a CPU wheel, say) before anything asks for more.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA),dev]'
	@touch $@

demo: $(INSTALLED)
	@mkdir -p build/demo
	$(BIN)/compress run examples/tiny-llm --out build/demo/sparse.onnx --num-calibration-samples 64 --force

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

# Half an hour and more: runs killed at every named point and at 200 random moments.
faults: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/faults/kill_runs.py --moments 200

# A quarter of an hour: runs of 2 and 4 processes on the CPU, against those of one; processes killed, silent, restarted.
distributed: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/faults/distributed_runs.py

# Ten thousand mutated files of each format that the program reads.
fuzz: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/fuzz/fuzzing.py --mutations 10000

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
