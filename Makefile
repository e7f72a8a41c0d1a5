# make deploy   this machine: a model answers on http://127.0.0.1:8000/v1
# make test     what CI runs       make test-slow   the rest
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.clusterkit

.PHONY: venv deploy test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -2

venv: $(STAMP)

# The kit from this checkout, with what its tests need: one environment for users and tests.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "clusterkit needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	       echo "Install one (apt-get install -y python3) or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make environments. Install it: apt-get install -y python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(STAMP)

deploy: $(STAMP)
	$(BIN)/python -m clusterkit deploy -i inventory/local

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .ansible
