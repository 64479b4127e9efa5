# `make demo` and `make test` need Python >= 3.11 only. They create .venv once and reuse it.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.PHONY: help demo test test-all test-adapters lint format typecheck tables benchmark clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python >= 3.11 is needed; call: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --progress-bar on -r requirements.txt
	$(PY) -m pip install --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(PY) -m pip install --progress-bar on -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.runtime  ## train, score and tabulate on the built-in data (about 2 minutes)
	$(PY) train.py experiment=demo
	$(PY) test.py -r saved/demo/synthetic/tiny/ce/seed0/best_model.pth -p all
	$(PY) scripts/overview.py saved/demo/synthetic/tiny/ce/seed0 --out saved/demo/overview.png
	$(PY) scripts/paper_tables.py --saved saved/demo

test: lint  ## run lint, types and the default tests
	$(PY) -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.dev  ## run every test, including the slow ones
	$(PY) -m pytest -n 2 --dist worksteal -m "slow or not slow"

# nnU-Net without its requirements: a part of its training code asks for an older timm.
NNUNET := nnunetv2==2.8.1 dynamic-network-architectures==0.4.4 batchgenerators==0.25.5 batchgeneratorsv2==0.3.6 \
  acvl-utils==0.2.6
test-adapters: $(VENV)/.dev  ## install the libraries of scripts/adapters/ and test on them
	$(PY) -m pip install --progress-bar on -r requirements-adapters.txt
	$(PY) -m pip install --progress-bar on --no-deps $(NNUNET)
	$(PY) -m pytest tests/scripts/test_adapters.py

lint: $(VENV)/.dev  ## run ruff and mypy
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## format the code
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

tables: $(VENV)/.runtime  ## regenerate every table and page in git, check them, verify the recorded results
	$(PY) scripts/paper_tables.py --write
	$(PY) scripts/config_reference.py
	$(PY) scripts/paper_tables.py --check
	$(PY) scripts/paper_tables.py --verify

benchmark: $(VENV)/.dev  ## measure the speed of the rules, as ratios in one run
	$(PY) scripts/benchmark.py rules

clean:  ## remove the environment and caches; keep saved/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
