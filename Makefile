# make deploy   this machine: a model answers on http://127.0.0.1:8000/v1
# make test     what CI runs       make test-slow   the rest       make bench   tables
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.clusterkit
TESTS  := $(VENV)/.clusterkit-tests

.PHONY: venv deploy test test-slow lint bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -2

venv: $(STAMP)

# The kit from this checkout.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "clusterkit needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	       echo "Install one (apt-get install -y python3) or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make environments. Install it: apt-get install -y python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $(STAMP)

# What the tests need besides; users need none of it.
$(TESTS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(TESTS)

deploy: $(STAMP)
	$(BIN)/python -m clusterkit deploy -i inventory/local

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline -q

# -rs: what was skipped, and why, stands at the end.
test: $(TESTS) lint
	$(BIN)/python -m pytest -rs -m "not slow" $(PYTEST_ARGS)

test-slow: $(TESTS)
	$(BIN)/python -m pytest -rs -m "slow" $(PYTEST_ARGS)

# Tables with ratios of one run; each makes a lab of its own and takes it away.
bench: $(TESTS)
	$(BIN)/python -m bench.cold
	$(BIN)/python -m bench.light_hosts
	$(BIN)/python -m bench.ray_up
	$(BIN)/python -m bench.distribution
	$(BIN)/python -m bench.engine_start
	$(BIN)/python -m bench.fleet_loop
	$(BIN)/python -m bench.autoscaler
	$(BIN)/python -m bench.serve_path

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .ansible
