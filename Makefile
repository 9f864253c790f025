# The README's two commands are `make run` and `make test`; each makes .venv first if it is missing
# or older than what it is made from. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a run needs, and with it what tests, documentation and checks need: one environment, two stamps.
RUN := $(VENV)/.run
ALL := $(VENV)/.all
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -c constraints.txt -e

# Both are added at the end of the command line:
#   make run ARGS="seed=42,43,44"        make test ARGS="tests/test_plan.py -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test bench docs check lint format env clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUN) ## the original experiment for both models on the embedded corpus (ARGS="seed=42,43")
	$(BIN)/python train.py -m experiment=original model=standard,deep_supervision $(ARGS)

test: $(ALL) ## all tests, files in parallel (ARGS="-k growth"; ARGS="-n 0 --pdb")
	$(BIN)/python -m pytest -m "cluster or not cluster" -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(ALL) ## how near a training step is to what this machine can do (ARGS="--short")
	$(BIN)/python benchmarks/step.py $(ARGS)

docs: $(ALL) ## the documentation site, into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server -d build/site"

check: $(ALL) ## style, formatting and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lint: check ## the same as check

format: $(ALL) ## mend style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(ALL) ## make or renew .venv with the pinned versions (PYTHON=python3.13)

# An environment of another Python or a broken one is made again; a good one is only brought up to
# date. A stamp comes last, so an interrupted installation goes on at the next call.
$(RUN): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; name a Python 3.11 to 3.13: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("error: Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) comes without venv and ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing what a run needs into $(VENV) (once; a minute or two) ..."
	@test "$$($(BIN)/python -c 'import pip, sys; print(sys.version_info[:2])' 2>/dev/null)" = "$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')" || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) .
	@touch $@

$(ALL): $(RUN)
	@echo "installing what tests, checks and documentation need into $(VENV) (once; a minute or two) ..."
	@$(PIP) ".[test,joblib]"
	@touch $@

clean: ## remove .venv and every cache; results in multirun/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
