# Each target first installs its requirements in .venv if they are missing or out of date.
# PYTHON=/path/to/python selects the Python (3.10, 3.11 or 3.12); ARGS="..." is passed to the command.

VENV := .venv
# Files that .venv depends on. tools/setup.sh writes the two stamps; the full set-up includes the core one.
SOURCES := setup.py pyproject.toml constraints.txt tools/setup.sh
CORE := $(VENV)/.core
FULL := $(VENV)/.full

export PYTHON

.PHONY: help setup fit test docs lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@echo 'make TARGET [ARGS="..."] [PYTHON=/path/to/python]'
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(FULL) ## install the package with all extras in .venv

fit: $(CORE) ## train on the bundled data set: imvia-graph fit countries $(ARGS)
	@$(VENV)/bin/imvia-graph fit countries $(ARGS)

# GOMP_SPINCOUNT as imvia-graph sets it (docs/benchmarks.md): waiting threads soon release their cores. Without it,
# the tests take several times as long while other programs run.
# One process per core, at most four; the tests of a file run in one process, because they share trained runs.
test: export GOMP_SPINCOUNT ?= 1000
test: $(FULL) ## run the tests: pytest $(ARGS)
	@$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

docs: $(FULL) ## build the documentation in docs/_build/html; warnings are errors
	@rm -rf docs/_api
	@$(VENV)/bin/sphinx-build -q -E -W --keep-going $(ARGS) docs docs/_build/html
	@echo docs/_build/html/index.html

lint: $(FULL) ## check style and types: ruff, mypy
	@failed=0; \
	$(VENV)/bin/ruff check . || failed=1; \
	$(VENV)/bin/ruff format --check . || failed=1; \
	$(VENV)/bin/python tools/typecheck.py || failed=1; \
	exit $$failed

clean: ## remove .venv and all other generated files
	@rm -rf $(VENV) .compatibility docs/_api docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(CORE): $(SOURCES)
	@tools/setup.sh core

$(FULL): $(SOURCES)
	@tools/setup.sh full
