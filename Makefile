# Every target sets itself up: on a fresh machine `make quickstart` and `make test` are all there is to type.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
# Modules are compiled when they are first imported and kept in the environment that is made here: compiling all of torch
# and transformers ahead of time takes over a minute, and compiling at each start takes some seconds each time.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --editable
# A file's tests stay on one worker, so that what they share is made once; tests/conftest.py says which files come first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart test test-all check bench docs clean

setup: $(READY)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $(INSTALLED)

# With all that tests and checks need. Collecting the tests once compiles what they import, which both workers would
# otherwise do; what fails there is reported by the tests.
$(READY): $(INSTALLED)
	$(INSTALL) '.[test]'
	$(BIN)/python -m pytest --collect-only -q > /dev/null || true
	touch $(READY)

quickstart: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bigmix quickstart

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(READY)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/save.py
	$(BIN)/python benchmarks/chaos.py

docs: $(READY)
	$(BIN)/python -m bigmix.recipe.document > docs/recipe.md

clean:
	rm -rf $(VENV) runs build *.egg-info
