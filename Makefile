# `make demo` and `make test` need Python >= 3.10, make and a C compiler: each sets up .venv first.
# With a C++ compiler they also build and install runtime/, which runs packed models; without one they go on.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUNTIME := $(VENV)/.runtime
RUNTIME_FILES := $(filter-out %.so,$(wildcard runtime/*.* runtime/src/* runtime/blockpress_runtime/*))

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

.PHONY: all venv demo test faults distributed fuzz versions check format clean

all: check test

venv: $(INSTALLED)

# torch first and alone: pip then takes the build that is at hand (a CPU wheel, say) before anything asks for more.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA),dev]'
	@touch $@

# cmake comes from the package registry where the system has none.
$(RUNTIME): $(INSTALLED) $(RUNTIME_FILES)
	@for compiler in $${CXX:-c++} g++ clang++ cl; do found=$$(command -v $$compiler) && break; done; \
	if [ -n "$$found" ]; then \
		$(BIN)/python -m pip install --quiet --no-deps ./runtime && touch $@; \
	else \
		echo "No C++ compiler: blockpress-runtime is not built, its tests are skipped, and packed models do not run here."; \
	fi

demo: $(RUNTIME)
	@mkdir -p build/demo
	$(BIN)/compress run examples/tiny-llm --out build/demo/sparse.onnx --num-calibration-samples 64 --force
	$(BIN)/compress export build/demo/sparse.hf --out build/demo/int8.onnx --dtype int8 --force
	$(BIN)/compress bench build/demo/int8.onnx --html build/demo/bench.html

test: $(RUNTIME)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

# An hour: runs killed at every named point and at 200 random moments, and a full disk at every write.
faults: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/faults/kill_runs.py --moments 200 --writes

# A quarter of an hour: runs of 2 and 4 processes on the CPU, against those of one; processes killed, silent, restarted.
distributed: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/faults/distributed_runs.py

# Ten thousand mutated files of each format that the program reads, and two hundred by the real command: hours. Then twenty
# thousand matrices for the runtime's kernels.
fuzz: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python tests/fuzz/fuzzing.py --mutations 10000 --commands 200 --processes 10
	$(BIN)/cmake -S runtime -B build/driver -DBLOCKPRESS_DRIVER=ON
	$(BIN)/cmake --build build/driver
	build/driver/driver --rounds 20000

# The built runtime in several releases of ONNX Runtime, each in an environment of its own.
versions: $(RUNTIME)
	$(BIN)/python tests/versions/run_matrix.py

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
