# Needs python3 (3.11 or newer, with venv), git and make; uses uv where it is on the PATH.
# Another interpreter: `make PYTHON=/path/to/python3 test`. More of pytest: `make test PYTEST_ARGS='-k intake'`.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PYTEST_ARGS ?=
DEV_ARGS ?=
DEMO_ARGS ?=
KEEP ?=
FAULTS_ARGS ?=

UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
STAMP := .venv/installed
PIP_OPTIONS := --quiet --disable-pip-version-check --no-input
LOCK_OPTIONS := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet

.PHONY: help
help: ## What can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## The virtual environment in .venv, exactly as locked

# The stamp is written last, so an install that was interrupted is gone on with. An environment whose
# interpreter is gone is laid anew.
$(STAMP): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version)'
	@$(BIN)/python -c '' 2>/dev/null || rm -rf .venv
ifneq ($(UV),)
	@test -d .venv || $(UV) venv --quiet --python '$(PYTHON)' .venv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
else
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation --editable .
endif
	@touch $@

.PHONY: demo
demo: venv ## The main job with everything that can go wrong, then every promise checked; KEEP=1 leaves it running
	@$(BIN)/kino-refunds demo $(if $(KEEP),--keep) $(DEMO_ARGS)

.PHONY: dev
dev: venv ## Postgres, Valkey, worker and beat until Ctrl-C; the data is kept
	@$(BIN)/kino-refunds dev $(DEV_ARGS)

.PHONY: lint
lint: venv ## Style, format, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy kino_refunds workers tests

# Two processes with servers of their own each; a file's tests stay together, so that its order is kept.
.PHONY: test
test: lint ## Lint, types and every test: what CI runs
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: bench-checks
bench-checks: venv ## What reconciliation costs on a ledger of five million transfers
	@$(BIN)/python -m tests.benchmarks.reconcile $(BENCH_CHECKS_ARGS)

.PHONY: faults
faults: venv ## Every fault, then every planted bug, against real servers; what was lost or paid twice
	@$(BIN)/python -m tests.faults.run $(FAULTS_ARGS)

.PHONY: bench
bench: venv ## Refunds per second on this machine; the last line is one JSON object
	@$(BIN)/python -m tests.benchmarks.throughput

.PHONY: lock
lock: ## Newest versions that fit into the lock files (needs uv)
	@test -n '$(UV)' || { echo 'make lock needs uv on the PATH' >&2; exit 2; }
	$(UV) pip compile --upgrade $(LOCK_OPTIONS) --extra dev -o requirements-dev.lock pyproject.toml
	$(UV) pip compile --upgrade $(LOCK_OPTIONS) -c requirements-dev.lock -o requirements.lock pyproject.toml
	@! grep -n '://' requirements.lock requirements-dev.lock || { echo 'a lock file names an address' >&2; exit 1; }

.PHONY: clean
clean: ## Remove what was made here, but not the data that `make dev` keeps
	rm -rf .venv .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
