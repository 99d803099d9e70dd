# What a newcomer types on a fresh machine with Python 3.10 or newer: `make demo`, `make test`.
#
#   make demo         install, then text -> tokenizer -> training -> resume -> export -> generated text -> report (CPU)
#   make test         the whole test suite
#   make check        format, lint, types, unit tests: before every commit
#
# VENV= puts the virtual environment elsewhere, PYTHON= picks the interpreter that makes it, PIP_FLAGS= goes to pip
# (say `PIP_FLAGS="--extra-index-url …"` for a CPU build of torch), PYTEST_FLAGS= to pytest.

VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUFF := $(BIN)/python -m ruff
# one thread per process: the tests start several, and two cores are enough for all of them
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.PHONY: demo test check lint format-check ruff types unit dist e2e golden debug-train soak format clean

demo: $(INSTALLED)
	$(BIN)/python -m internlm_ds.testing.demo

test: $(INSTALLED_TEST)
	$(PYTEST)

check: lint unit

lint: format-check ruff types

format-check: $(INSTALLED_TEST)
	$(RUFF) format --check .

ruff: $(INSTALLED_TEST)
	$(RUFF) check .

types: $(INSTALLED_TEST)
	$(BIN)/python -m mypy

unit: $(INSTALLED_TEST)
	$(PYTEST) tests/unit

# several processes on this machine, over gloo
dist: $(INSTALLED_TEST)
	$(PYTEST) tests/distributed

e2e: $(INSTALLED_TEST)
	$(PYTEST) tests/e2e

# against recorded runs of InternEvo; INTERNLM_DS_GOLDEN names their folder
golden: $(INSTALLED_TEST)
	$(PYTEST) tests/golden

# a tiny model on random data, one process, a few seconds
debug-train: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python launch/pretrain.py --config model_configs/debug_cpu.py --run-dir runs/debug

# the long loops: tests marked `soak`, and every property with many more examples
soak: $(INSTALLED_TEST)
	INTERNLM_DS_SOAK=1 PYTHONPATH=tests $(PYTEST) -p soak_profile --timeout 3600 \
		-m "soak or hypothesis" tests

format: $(INSTALLED_TEST)
	$(RUFF) format .
	$(RUFF) check --fix .

clean:
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; name another: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	@echo "installing internlm-ds into $(VENV); the first time this takes a minute or more"
	$(PIP) install --quiet $(PIP_FLAGS) -e .
	@touch $@

$(INSTALLED_TEST): pyproject.toml | $(VENV)/bin/python
	@echo "installing internlm-ds and what its tests need into $(VENV); the first time this takes a minute or more"
	$(PIP) install --quiet $(PIP_FLAGS) -e ".[test]"
	@touch $(INSTALLED) $@
