# Every target sets up .venv by itself, from a bare Python 3.11.
#   make demo     the tiny model, three TPAW iterations, a table
#   make small-study    methods side by side on the tiny model, some two and a half hours; QUICK=--quick only shows that it works
#   make test     the tests
#   make test-faults    the kill matrix
#   make test-long      what takes minutes a test: 200 000 prompts, a run in an object store, two workers of which one dies, a judge served by vLLM
#   make test-cluster      a cluster of several nodes on this machine: jobs, placement, a lost node
#   make check    lint and types
#   make install EXTRA=gpu    the same environment for a machine with GPUs; the other targets then keep to it
PYTHON ?= python3.11
VENV := .venv
EXTRA ?= $(if $(wildcard $(VENV)/installed-gpu),gpu,cpu)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(EXTRA)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo small-study test test-faults test-long test-cluster check smollm2 clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml cluster/install.sh cluster/overrides-cpu.txt cluster/constraints-cpu.txt cluster/requirements-moto.txt
	$(PYTHON) -m venv $(VENV)
	cluster/install.sh $(BIN) $(EXTRA)
	rm -f $(VENV)/installed-*
	touch $@

demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python jobs/demo_model.py
	$(BIN)/tpaw run jobs/demo.yaml

small-study: install
	printf '%s\n' 0 1 2 3 4 100 | OMP_NUM_THREADS=1 xargs -P 2 -I{} \
	  $(BIN)/python jobs/demo_model.py --to models/study-{} --seed {} --looks 8 --test-rows 1000
	$(BIN)/tpaw experiment jobs/small_study.yaml $(QUICK)

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest tests/ray tests/e2e

test-faults: install
	$(BIN)/python -m pytest -s tests/faults

test-long: install
	$(BIN)/python -m pytest tests/long

test-cluster: install
	$(BIN)/python -m pytest tests/cluster

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: install
	$(BIN)/python jobs/fetch_smollm2.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
