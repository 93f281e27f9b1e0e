# One command for each habit; `make` alone lists them. All of them set up what they need in .venv.

PYTHON ?= python3
VENV ?= .venv
# More options for pip, for example PIP_FLAGS="--find-links /some/folder".
PIP_FLAGS ?=
# How long `make attack` takes, all attacks together.
MINUTES ?= 20
# More arguments for demo, test and bench, for example make test ARGS="-k entropy".
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt $(PIP_FLAGS)
CSRC := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(CSRC))
FAILURE_NOTE := python/flashmaps/_native_build_failed.txt

.PHONY: help setup browser build demo test test-all attack sanitize lint format bench bench-explore docs dist gpu-check carried wheel clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' Makefile | expand -t 16

setup: $(VENV)/.native $(VENV)/.installed  ## create .venv with everything in it, at the pinned versions
	@test ! -e $(FAILURE_NOTE) || { echo; \
	  echo "flashmaps works here, but slowly: its C++ extension was not built."; \
	  cat $(FAILURE_NOTE); echo; } >&2

browser:  ## find chromium, which tests of the explorer need, or install it (Debian, Ubuntu, as root)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "There is no chromium, so tests in a browser are skipped; get it: apt install chromium" >&2

build: setup  ## compile what has changed in csrc/
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup  ## match the two views of a real stereo pair and write a report
	$(BIN)/flashmaps demo $(ARGS)

test: setup browser  ## run the tests, all but the slow ones
	$(BIN)/python -m pytest $(ARGS)

test-all: setup browser  ## run the tests, the slow ones too
	$(BIN)/python -m pytest -m "" $(ARGS)

attack: setup  ## random cases, bad input and kills for MINUTES=20; what is found is printed
	$(BIN)/python tests/attack --minutes $(MINUTES) $(ARGS)

sanitize: setup  ## build the C++ kernels with address and undefined-behaviour sanitizers, attack them
	$(BIN)/python tests/sanitize.py $(ARGS)

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

format: setup  ## put Python and C++ sources into the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

bench: setup  ## run the benchmarks
	$(BIN)/python -m pytest benches -m "" $(ARGS)

bench-explore: setup browser  ## time the explorer: pointer to picture, ten visitors for a minute
	$(BIN)/python benches/explore.py $(ARGS)

gpu-check:  ## on a machine with a GPU: check its kernels, time them; installs nothing
	bash -c '. benches/gpu/env.sh && exec $(PYTHON) benches/gpu/session.py --keep $(ARGS)'

docs: setup  ## build the documentation site into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

dist: setup  ## build what a release holds, check it, and try it in clean environments (ARGS=--light)
	$(BIN)/python tests/dist.py $(ARGS)

carried: setup  ## build/carried, which a machine with a card is given along: modules, a Triton cache
	$(BIN)/python benches/gpu/carried.py $(ARGS)

wheel: setup  ## build dist/: the sdist, and a wheel from it
	$(BIN)/python -m build --no-isolation

clean:  ## delete what was built; .venv stays, as does what is in it
	rm -rf build dist python/flashmaps.egg-info python/flashmaps/_C.*.so python/flashmaps/_cuda.*.so
	rm -rf python/flashmaps/_*_build_failed.txt $(VENV)/.native
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find csrc kernels python benches tests -name __pycache__ -prune -exec rm -rf {} +

# The environment, in four steps. Each leaves a file, so a second `make setup` does nothing.

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one:" \
	    "make setup PYTHON=/path/to/python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "flashmaps needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make setup PYTHON=python3.12"; exit 1; } >&2
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) could not create $(VENV). Debian and Ubuntu keep what it needs in a package" \
	    "of its own: apt install python3-venv"; exit 1; } >&2

$(VENV)/.build-tools: constraints.txt | $(BIN)/python
	$(PIP) setuptools wheel pybind11 cmake ninja
	@touch $@

# No file is left after a failed build, so that the next command tries again.
$(VENV)/.native: setup.py CMakeLists.txt $(CSRC) $(VENV)/.build-tools
	$(BIN)/python setup.py --quiet build_ext --inplace
	@test -e $(FAILURE_NOTE) || touch $@

# torch first and by itself: what comes after cannot choose another one. Without build isolation
# the extension just built is found again and kept.
$(VENV)/.installed: constraints.txt pyproject.toml setup.py | $(VENV)/.native
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
