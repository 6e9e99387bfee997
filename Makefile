# Every target creates the environment it needs, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup native test lint bench sanitize codegen traffic gpu docs clean

help:
	@echo "make setup     create the environment"
	@echo "make native    build the CPU's library with this machine's C++ compiler"
	@echo "make test      the test suite"
	@echo "make lint      ruff and mypy"
	@echo "make bench     check and time the layers on this machine (5 minutes)"
	@echo "make sanitize  the kernels under a launch checker: bounds and races, no GPU needed"
	@echo "make codegen   compile every kernel for four GPU targets, no GPU needed"
	@echo "make traffic   count what the kernels move through memory, no GPU needed"
	@echo "make gpu       test and time everything on a GPU (7 minutes)"
	@echo "make docs      build the documentation into site/"

setup: $(VENV)/.ready

# torch first and pinned: extras would otherwise resolve it on their own.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch triton
	$(PIP) --constraint constraints.txt --editable '.[dev,export,models]'
	touch $@

# The launch checker declares a newer Python and torch than it needs.
$(VENV)/.sanitize: $(VENV)/.ready
	$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

native: setup
	$(BIN)/python -m wn_kernels build

test: native
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 25

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: native
	$(BIN)/python -m bench

sanitize: $(VENV)/.sanitize
	$(BIN)/python -m ttsem.sanitize pytest tests/backends/triton -m sanitize --quiet

codegen: setup
	$(BIN)/python -m bench codegen --json results/codegen.json

traffic: setup
	$(BIN)/python -m bench traffic

gpu: setup
	$(BIN)/python -m bench gpu --out docs/results/gpu

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build results
