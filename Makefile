# Every target sets up .venv by itself, from a bare Python 3.11.
#   make demo     the tiny model, three TPAW iterations, a table
#   make test     the tests
#   make test-faults    the kill matrix
#   make test-long      what takes minutes a test: 200 000 prompts, a run in an object store, two workers of which one dies, a judge served by vLLM
#   make check    lint and types
#   make install EXTRA=gpu    the same environment for a machine with GPUs
PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(EXTRA)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test test-faults test-long check smollm2 clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml cluster/install.sh cluster/overrides-cpu.txt cluster/constraints-cpu.txt cluster/requirements-moto.txt
	$(PYTHON) -m venv $(VENV)
	cluster/install.sh $(BIN) $(EXTRA)
	touch $@

demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python jobs/demo_model.py
	$(BIN)/tpaw run jobs/demo.yaml

test: install
	$(BIN)/python -m pytest

test-faults: install
	$(BIN)/python -m pytest -s tests/faults

test-long: install
	$(BIN)/python -m pytest tests/long

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: install
	$(BIN)/python jobs/fetch_smollm2.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
