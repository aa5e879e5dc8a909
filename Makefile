# make serve    install, then serve the demo model on port 30000
# make test     install, then all tests that need no GPU
# make check    lint, format, types, import directions

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
PORT ?= 30000
ARGS ?=

.PHONY: install serve test test-unit test-kernels test-e2e test-gpu check format clean

install: $(INSTALLED)

# Bytecode is compiled once: sglang imports 9,000 modules in each of its processes, and that halves the time.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet uv==0.13.9
	$(RUN) uv pip install --quiet --python $(VENV)/bin/python --compile-bytecode --constraint constraints.txt --editable '.[test,eval]'
	touch $@

serve: $(INSTALLED)
	$(RUN) sglmoe.launch_server --port $(PORT) $(ARGS)

test: test-unit test-kernels test-e2e

test-unit: $(INSTALLED)
	$(RUN) pytest tests/unit

# Compiled for GPUs that are not here; then, in a process of its own, interpreted on the CPU.
test-kernels: $(INSTALLED)
	$(RUN) sglmoe.kernels.compile
	$(RUN) pytest tests/kernels
	$(RUN) pytest tests/kernels_codec
	$(RUN) pytest tests/pretend_cuda

test-e2e: $(INSTALLED)
	$(RUN) pytest tests/e2e -m 'not gpu'

test-gpu: $(INSTALLED)
	$(RUN) pytest tests/gpu

check: $(INSTALLED)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) pytest --quiet tests/unit/test_architecture.py

format: $(INSTALLED)
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
