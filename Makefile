# Everything starts from Python 3.11 or newer and make: each target sets up .venv when it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo-output
# Files of tests at once. Most of a test on Ray is waiting for processes to start; each of these has its own cluster.
AT_ONCE ?= 3

# Where it is set, every process of a test or a benchmark compiles batchcls again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu long chaos lint format type bench docs dist clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

setup: $(STAMP)  ## create .venv with everything in it

# uv is several times faster than pip; where it cannot reach what pip is set up for, pip does it. Compiled at once,
# as pip does: where Python may not write next to its packages, every process would compile torch and Ray again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); a few minutes the first time"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## draw a catalog, train a backbone, classify it with the real job
	@$(BIN)/python examples/demo.py --output $(DEMO)

test: $(STAMP)  ## unit, contract, integration and repository tests
	@$(BIN)/python -m pytest -m 'not gpu and not long and not chaos' -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder --durations=10

gpu: $(STAMP)  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

long: $(STAMP)  ## the long tests: every backbone of the zoo through the real job, ten crops, accuracies
	@MALLOC_ARENA_MAX=1 $(BIN)/python -m pytest -m long -s

chaos: $(STAMP)  ## 50 runs that are killed, a store that fails, mutated images; over an hour on two cores
	@$(BIN)/python -m pytest -m chaos -s

lint: $(STAMP)  ## style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)  ## fix the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

type: $(STAMP)  ## types
	@$(BIN)/mypy

bench: $(STAMP)  ## compare with Ray's and Daft's examples, a DataLoader script and a bare loop; 40 minutes
	@$(BIN)/python -c 'import daft' 2>/dev/null \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m benchmarks.run
	@$(BIN)/python -m benchmarks.engine_speed

docs: $(STAMP)  ## generate the reference pages and build the documentation into site/
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

dist: $(STAMP)  ## build the wheel and the source distribution into dist/
	@rm -rf dist build
	@$(BIN)/uv build -q --no-build-isolation --python $(BIN)/python --out-dir dist
	@rm -rf build
	@ls dist

clean:  ## remove what the demo and the tests left; keeps .venv
	rm -rf $(DEMO) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
