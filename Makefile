# Each target sets up what it needs in .venv (setup.sh), once. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
ARGS ?=
NAME ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHON ?= python3

.PHONY: help demo test check fix bench docs pins clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo:  ## an embedded broker, a worker and a real stream; then the page. ARGS="--once --report r.json"
	@./setup.sh run
	@$(BIN)/headwater demo $(ARGS)

test:  ## the whole suite, in three processes. ARGS="tests/test_settings.py -k secret" for a part of it
	@./setup.sh test
	@$(BIN)/python -m pytest $(or $(ARGS),-n 3)

check:  ## format, lint, types, import arrows; no tests
	@./setup.sh test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix:  ## formats, and mends what ruff can mend
	@./setup.sh test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench:  ## benchmarks; NAME=pipeline ARGS="--events 100000" runs one, without NAME it lists them
	@./setup.sh test
	@$(BIN)/python -m bench $(NAME) $(ARGS)

docs:  ## the generated documents: JSON Schemas and docs/asyncapi.yaml
	@./setup.sh run
	$(BIN)/python -m streams.events

pins:  ## writes the versions in .venv into constraints.txt
	@./setup.sh test
	@{ grep -E '^(#|torch==)' constraints.txt; \
	   $(BIN)/pip freeze --exclude-editable --exclude headwater | grep -v '^torch=='; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## removes .venv and everything that runs have left here
	rm -rf .venv .cache var build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
