# Every target creates the environment it needs, in .venv; `newest` and `oldest` in their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup native test newest oldest lint bench sanitize sanitize-kernels sanitize-native
.PHONY: codegen traffic occupancy host gpu docs figures package clean

help:
	@echo "make setup     create the environment"
	@echo "make native    build the CPU's library with this machine's C++ compiler"
	@echo "make test      the test suite"
	@echo "make newest    the test suite on the newest torch and triton, in .venv-newest"
	@echo "make oldest    and on the oldest, in .venv-oldest"
	@echo "make lint      ruff and mypy"
	@echo "make bench     check and time the layers on this machine (5 minutes)"
	@echo "make sanitize  the kernels under a launch checker: bounds and races, no GPU needed;"
	@echo "               the native library under address and undefined-behaviour sanitizers"
	@echo "make codegen   compile every kernel for four GPU targets, no GPU needed"
	@echo "make occupancy how the planned paths fill a GPU, by the cost model"
	@echo "make traffic   count what the kernels move through memory, no GPU needed"
	@echo "make host      time what the processor takes for small calls, no GPU needed (1 minute)"
	@echo "make gpu       test and time everything on a GPU (7 minutes)"
	@echo "make docs      build the documentation into site/"
	@echo "make figures   draw the pictures of the documentation anew"
	@echo "make package   build the wheel and the source archive into dist/, and check them"

setup: $(VENV)/.ready

# What takes the place of the same packages' lines in constraints.txt, as name==version.
PINS :=

$(VENV)/constraints.txt: constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed $(foreach pin,$(PINS),-e '/^$(firstword $(subst =, ,$(pin)))==/d') -e '' $< > $@
	printf '%s\n' $(PINS) >> $@

# torch first and pinned: extras would otherwise resolve it on their own.
$(VENV)/.ready: pyproject.toml $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt torch triton
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[dev,export,models]'
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

# The releases that pyproject.toml says were tried. Both environments hold a CUDA build of torch, of
# several GB. The interpreter of triton 3.5 fails with a newer numpy.
newest:
	$(MAKE) test VENV=.venv-newest PINS='torch==2.14.1 triton==3.8.0'

oldest:
	$(MAKE) test VENV=.venv-oldest PINS='torch==2.9.0 triton==3.5.0 numpy==2.3.5'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: native
	$(BIN)/python -m bench

sanitize: sanitize-kernels sanitize-native

sanitize-kernels: $(VENV)/.sanitize
	$(BIN)/python -m ttsem.sanitize pytest tests/backends/triton -m sanitize --quiet

sanitize-native: setup
	$(BIN)/python -m tests.sanitize

codegen: setup
	$(BIN)/python -m bench codegen --json results/codegen.json

traffic: setup
	$(BIN)/python -m bench traffic

occupancy: setup
	$(BIN)/python -m bench occupancy

host: native
	$(BIN)/python -m bench host

gpu: setup
	$(BIN)/python -m bench gpu --out docs/results/gpu

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: setup
	$(BIN)/python -m docs.drawings

$(VENV)/.package: $(VENV)/.ready
	$(PIP) --constraint constraints.txt --editable '.[package]'
	touch $@

package: $(VENV)/.package
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv* site build dist results
