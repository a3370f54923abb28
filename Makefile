# Needs Python 3.11 or later, git and make. Everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000
REPORTS_PORT ?= 5080

BIN := $(CURDIR)/.venv/bin
PHOTOGRAPHS := $(addprefix benchmarks/,photographs.py few_images.py decoders.py denoisers.py)
BENCHMARKS := $(filter-out $(PHOTOGRAPHS) benchmarks/dataset.py,$(wildcard benchmarks/*.py))
INSTALLED := .venv/.installed

export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Turn off the usage statistics of all tools.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help install demo test services fuzz endurance lint up down bench

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## Install vlmdiff, dvc and what the tests need into .venv

demo: $(INSTALLED) ## Train, register and judge a model: the flow `retrain` on params.yaml
	@python -m flows.retrain

test: $(INSTALLED) ## Run the tests
	@pytest --numprocesses auto --maxprocesses 4 --dist worksteal

services: $(INSTALLED) ## Run the tests that start and kill servers, workers and training (half an hour)
	@pytest -m services

fuzz: $(INSTALLED) ## Try a million mutated images, models, tables, captions and requests (a quarter of an hour)
	@pytest -m fuzz --numprocesses auto --maxprocesses 4

endurance: $(INSTALLED) ## Run the tests of long load (half an hour)
	@pytest -m endurance

lint: $(INSTALLED) ## Check style, format and types
	@ruff check .
	@ruff format --check .
	@pyrefly check

up: $(INSTALLED) ## Start the servers and a worker on this machine, and deploy the flows
	@python -m flows.servers up --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT) \
		--reports-port $(REPORTS_PORT)

down: $(INSTALLED) ## Stop what `make up` started
	@python -m flows.servers down

bench: $(INSTALLED) ## Run the benchmarks on the model of `make demo`
	@"$(BIN)/pip" install --quiet --quiet --constraint constraints.txt --editable '.[test,bench]'
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; python $$file; done
	@echo "Not run, because they need your own photos: $(PHOTOGRAPHS). These train for hours:"
	@for plan in benchmarks/ablations/*.yaml; do echo "  python benchmarks/ablations $$plan"; done

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv (takes a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@"$(BIN)/pip" install --quiet --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
