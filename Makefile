# Everything a user or CI runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# dvc.yaml says `python -m stages...`: the environment has to come first on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := true
export GX_ANALYTICS_ENABLED := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
TASK ?= recognition

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow soak lint types format clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete  ## The environment in .venv, from constraints.txt

# pip is quiet, and the marker is written last: an interrupted installation is begun again.
$(VENV)/.complete: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (some minutes)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[dev]'
	touch $@

demo: setup  ## One task as a flow, registered and promoted, then its report: make demo TASK=recognition
	@python -m stages.parameters
	python -m pipelines.distillation --task $(TASK)
	python -m stages.latency $(TASK)
	python -m pipelines.registry register $(TASK)
	python -m pipelines.registry promote $(TASK) || echo "the champion stays as it is, for the reasons above"
	python -m stages.report $(TASK)

test: lint types  ## Lint, types and the default tests
	python -m pytest -n logical

ui: setup  ## The pages of Prefect and MLflow, until Ctrl-C
	@echo "Prefect: http://127.0.0.1:4200   MLflow: http://127.0.0.1:5000   (Ctrl-C ends both)"
	@trap 'kill 0' INT TERM EXIT; \
	PREFECT_HOME="$(CURDIR)/.prefect" prefect server start --host 127.0.0.1 --port 4200 >/dev/null 2>&1 & \
	mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db >/dev/null 2>&1 & wait

slow: setup  ## Whole pipelines through the real command line
	python -m pytest -m "slow and not soak" -o timeout=900

soak: setup  ## Fault campaigns and the full default pipeline
	python -m pytest -m soak -o timeout=3600

lint: setup
	ruff check .
	ruff format --check .

types: setup
	mypy

format: setup  ## Put the code into its format
	ruff check --fix .
	ruff format .

clean:  ## Remove checkpoints and reports that nothing depends on
	rm -rf .checkpoints reports/latency reports/validation reports/index.html
