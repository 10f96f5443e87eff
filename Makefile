# Two commands do everything from a fresh clone: `make up` (the main job) and `make test` (all tests).
# PYTHON may name another interpreter (3.10 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Named on every call: the kubeconfig's current context may lead elsewhere, and stays the user's choice.
CONTEXT = $(BIN)/deployer cluster status --output json | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["context"])'

.DEFAULT_GOAL := help
.PHONY: help up down test unit e2e lint format lock docs bench clean

help: ## show the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

up: $(READY) ## make a local cluster if there is none, deploy dags/ and open the port-forward
	$(BIN)/deployer cluster up
	$(BIN)/deployer up --context "$$($(CONTEXT))"

down: $(READY) ## remove the deployment and stop the local cluster; data stays
	$(BIN)/deployer down --context "$$($(CONTEXT))"
	$(BIN)/deployer cluster down

test: lint unit e2e ## all tests: style, types, unit tests, and end to end on a real cluster

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY) ## tests that need neither Docker nor a cluster
	$(BIN)/python -m pytest tests/unit -q

e2e: $(READY) ## tests on the real Docker Engine, registry and Kubernetes API
	$(BIN)/deployer cluster up --airflow 2.11.2 --airflow 1.10.15
	$(BIN)/python -m pytest tests/e2e -v

format: $(READY) ## put the code into its usual form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## write the generated parts of the documentation
	$(BIN)/python -m airflow_deployer.config_reference > docs/configuration.md
	$(BIN)/python -m airflow_deployer.profile_reference > docs/versions.md
	PYTHONPATH=base-image $(BIN)/python -m airflow_deployer.moves_reference > docs/moving.md

lock: $(READY) ## resolve the pinned, hashed requirements anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --extra dev -o requirements-dev.txt pyproject.toml
	$(BIN)/python -m airflow_deployer.locking

# Debian splits venv off its Python; as root it is installed when it is missing.
$(READY): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed; name one: make PYTHON=python3.12 up" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv; } || { echo "Python's venv module is missing: install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

bench: $(READY) ## measure every budget on the real cluster, side by side with docker and kubectl (bench/README.md)
	$(BIN)/deployer cluster up
	$(BIN)/python -m bench

clean: ## remove what the targets above made here
	rm -rf $(VENV) artifacts .mypy_cache .pytest_cache .ruff_cache
