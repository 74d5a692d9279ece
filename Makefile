# `make demo` and `make test` set up everything they need; `make help` lists the rest.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
JOBS ?= 4
# Tests start Python some hundred times: what is compiled is kept, whatever the environment says.
PYTEST = PATH="$(abspath $(BIN)):$$PATH" PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

system: ## Install missing system packages: qemu-utils, qemu-system-common, libnbd-bin, python3-venv, e2fsprogs, systemd
	@examples/demo/install.sh

system-tests: ## The same, and what only tests use: MariaDB, PostgreSQL, OpenSSH, grub-fstest, strace
	@examples/demo/install.sh tests

$(BIN)/reconciler: pyproject.toml
	@$(MAKE) --no-print-directory system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(BIN)/reconciler
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,fuzz]'
	@touch $@

install: $(BIN)/reconciler ## Make a virtual environment with the command in it

dev: $(VENV)/.dev ## The same, with what tests and checks need

demo: $(BIN)/reconciler ## Run the main job on real disks, and clean up
	@PATH="$(abspath $(BIN)):$$PATH" examples/demo/run.sh

test: $(VENV)/.dev system-tests ## Run every test
	@$(PYTEST) -n $(JOBS) -m "not soak" --durations=10 $(ARGS)

soak: $(VENV)/.dev system-tests ## Run what takes long: every crash point, a thousand kills, ten thousand lives, fuzzing
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[soak]' || echo "no fuzzer for this Python"
	@$(PYTEST) -n $(JOBS) -m soak --durations=10 $(ARGS)

quick: $(VENV)/.dev ## Run the fast, pure tests
	@$(PYTEST) tests/core -m "not soak" $(ARGS)

e2e: $(VENV)/.dev system-tests ## Run the tests on real qemu-nbd
	@$(PYTEST) -n $(JOBS) tests/e2e -m "not soak" $(ARGS)

oldest: system-tests ## Run the tests with the oldest versions that are allowed
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/oldest.txt -e '.[dev]'
	@PATH="$(abspath .venv-oldest/bin):$$PATH" .venv-oldest/bin/python -m pytest -q -n $(JOBS) -m "not soak" $(ARGS)

check: $(VENV)/.dev ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# What is measured is what `pip install .` gives, in an environment of its own: a checkout that is
# installed to be edited starts slower.
.venv-bench: $(BIN)/reconciler
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check .

bench: .venv-bench ## Measure beside the floor and what others would use, as ratios within one run
	@PATH="$(abspath .venv-bench/bin):$$PATH" .venv-bench/bin/python -m bench.bench $(ARGS)

bench-guard: .venv-bench ## Fail if a ratio is more than 25 % above bench/baseline.json
	@PATH="$(abspath .venv-bench/bin):$$PATH" .venv-bench/bin/python -m bench.guard $(ARGS)

clean: ## Remove what was built here
	@rm -rf $(VENV) .venv-oldest .venv-bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: .venv-bench help system system-tests install dev demo test soak quick e2e oldest check bench bench-guard clean
