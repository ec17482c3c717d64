# Everything starts here: `make help`. The environment lives in .venv; a stamp says that it is complete, so that
# nothing is installed twice. pip runs with whatever configuration the user has.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package-installed
TOOLS := $(VENV)/.tools-installed

# One thread for each process: the tests are many and small, and run two at a time.
test test-slow: export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-gpu golden parity conformance bench lint types format audit build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(TOOLS)  ## make .venv with the package and its test tools

quickstart: $(PACKAGE)  ## pre-train, look, measure, fine-tune on the built-in images; ends with a report
	$(BIN)/maekit quickstart

test: lint types  ## lint, types and the fast tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(TOOLS)  ## the slow tests
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

test-gpu: $(TOOLS)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

golden: $(TOOLS)  ## freeze the golden numbers and every recipe's values anew, for a change that is meant
	MAEKIT_GOLDEN=renew $(BIN)/python -m pytest -q -n 0 -k golden tests/test_recipes.py tests/test_golden.py tests/tasks/test_releases.py

parity: $(TOOLS)  ## compare with transformers and timm; renews the table of docs/parity.md
	PARITY=docs/parity.md $(BIN)/python -m pytest -q -n 2 tests/parity

conformance: $(TOOLS)  ## audit maekit and the peers installed; renews docs/conformance.md (RESULTS=more audits)
	$(BIN)/python scripts/conformance.py $(RESULTS)

bench: $(TOOLS)  ## measure speed and memory; renews tables of docs/benchmarks.md (ONLY=train CORE=1 PHOTOS=DIR DEVICE=cuda)
	$(BIN)/python scripts/benchmarks.py --device $(or $(DEVICE),cpu) $(if $(ONLY),--only $(ONLY)) $(if $(CORE),--core $(CORE)) \
		$(if $(PHOTOS),--photos "$(PHOTOS)")

lint: $(TOOLS)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS)  ## basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(TOOLS)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(TOOLS)  ## ask the advisory databases about every installed package (installs pip-audit; needs a network)
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.9'
	$(BIN)/python -m pip_audit --skip-editable --progress-spinner off

build: $(TOOLS)  ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:  ## remove .venv, build results and caches
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing. Debian: apt-get install python3 python3-venv. Elsewhere: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "make: found $$($(PYTHON) --version 2>&1), expected Python 3.11 to 3.13. Try: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make environments. Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(PACKAGE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(TOOLS): $(PACKAGE)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
