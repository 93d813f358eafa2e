# Everything a checkout needs, from a machine with Python alone: `make help` lists the targets.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo install test test-all lint docs lock clean

# The first interpreter that runs and is of a supported version; `make PYTHON=... demo` overrides.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.12 python3.11 python3.13; do \
	if $$name -c '$(SUPPORTED)' 2>/dev/null; then echo $$name; exit; fi; done; echo python3)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
WORKDIR := runs/first

# Parallel test processes, each of which simulates eight devices; options for pytest in ARGS.
TEST_PROCESSES ?= 2
ARGS ?=
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# Programs that tests compile are kept, so that a second run takes a fraction of the first.
test test-all: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test test-all: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Large pages for what a step makes and frees: a few percent of its time (docs/performance.md).
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/.installed  ## install, train a small model on this machine, write its report
	@$(BIN)/python -m jaxllm.main --config=configs/pretrain.py --workdir=$(WORKDIR)
	@echo "The report: file://$(CURDIR)/$(WORKDIR)/report.html"

install: $(VENV)/.installed  ## make .venv with what a run needs

test: $(VENV)/.installed-test  ## the default tests
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-peers  ## the slow tests too, and those beside other implementations
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: $(VENV)/.installed-test  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## write docs/configuration.md from the declarations of the fields
	$(BIN)/python docs/generate.py

lock:  ## pin the newest versions that setup.cfg allows (needs uv)
	@command -v uv > /dev/null || { echo "make lock needs uv: python -m pip install uv" >&2; exit 1; }
	$(call compile,requirements.lock)
	$(call compile,requirements-test.lock,--extra test --constraints requirements.lock)

clean:  ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One file for Python 3.11 to 3.13 on Linux and macOS, free of the names of registries.
compile = UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal \
	--python-version 3.11 --no-emit-index-url --no-emit-find-links --no-annotate \
	$(2) setup.cfg --output-file $(1)

$(VENV)/bin/python:
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "jaxllm needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none of them" \
			"($$($(PYTHON) --version 2>/dev/null || echo it does not run))." \
			"Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: requirements.lock setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): a minute or two, and 1.2 GB of disk"
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.installed-peers: setup.cfg $(VENV)/.installed-test
	@echo "Installing the implementations that tests compare with into $(VENV)"
	@$(PIP) --editable '.[peers]'
	@touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) -r requirements-test.lock
	@touch $@
