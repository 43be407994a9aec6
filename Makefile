# A fresh clone needs Python 3.11 or newer, a package index and GNU make; the targets below bring the rest into .venv.
#
#   PYTHON    the interpreter to make .venv with         (default: the first of python3, python3.11, ... that is new enough)
#   PIP_ARGS  extra arguments for pip, e.g. --index-url of a mirror or of PyTorch's own CPU builds

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.mar-installed
RELEASED := models/smollm2-135m-mar
CANDIDATES := $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup quickstart chat test sanitize lint types docs wheel clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## make .venv and install the package with its tools; done once, and again when what it needs changes

# The stamp is written last, so that an interrupted set-up starts again.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/CMakeLists.txt)
	@python=; \
	for candidate in $(CANDIDATES); do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'No Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3.' >&2; exit 1; \
	fi; \
	[ -x $(BIN)/pip ] || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]' $(PIP_ARGS)
	@touch $@

quickstart: setup ## refine SmolLM2-135M into a small spiking model, and report on it; stop and repeat at will
	$(BIN)/mar quickstart

chat: setup ## talk with the released spiking model on the native engine; an empty line ends
	$(BIN)/mar chat $(RELEASED) --engine native

# Tests bring their own tiny models and data. Two workers of one thread each use two cores without fighting over them.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: lint types docs ## everything that CI runs: lint, types, docs, tests
	$(BIN)/pytest -n 2

# In a folder of its own, without Python. It takes minutes to build, so it is no part of `test`.
sanitize: ## the C++ tests under the address and undefined-behaviour sanitizers; needs cmake and a C++20 compiler
	cmake -S csrc -B build/sanitize -DMAR_SANITIZE=ON
	cmake --build build/sanitize --parallel 2
	build/sanitize/mar_tests

lint: setup ## style and layout
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## static types
	$(BIN)/pyright

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup ## build the documentation into site/; any warning is an error
	$(BIN)/mkdocs build --strict

wheel: setup ## build dist/*.whl for this platform; it installs where there is no compiler
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist . $(PIP_ARGS)

clean: ## remove .venv and everything built; runs/ and the caches of downloads stay
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
