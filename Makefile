# What a developer runs; .ci/run and the public workflow call the same targets.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup check format test test-all coverage docs lock

help:  ## list the targets
	@grep -E '^[a-z-]+: *##' $(MAKEFILE_LIST) | sed 's/: *## */\t/' | expand -t 12

setup:  ## make .venv with all that the tests need
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test,peers,features,optuna]' $(HYDRA)

check:  ## lint, format and types, as CI checks them
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format:  ## fix what ruff can fix
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

test:  ## the quick tier
	$(BIN)/python -m pytest

test-all:  ## everything
	$(BIN)/python -m pytest -m "slow or not slow"

coverage:  ## the quick tier, with the lines that no test runs
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

docs:  ## write docs/cli.md anew
	$(BIN)/python docs/generate_cli.py

lock:  ## write uv.lock anew, after a change of the requirements (pip install uv)
	uv lock --default-index https://pypi.org/simple
