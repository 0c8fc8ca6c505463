# make demo [SOURCE=raster, or SOURCE=ucmerced DATA=folder] | make rsicd DATA=folder
# make test [PYTEST=words] | make lint | make format | make docs | make clean
# A fresh machine needs Python 3.11, gcc and make. Everything else is installed below.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SOURCE ?= synthetic
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
# The virtual environment is rebuilt only if the pins or the requirements change.
PINS := $(shell cat constraints.txt setup.py | sha256sum | cut -c1-16)
READY := $(VENV)/ready-$(PINS)
# About half of the suite by its time. The other half has tests/cluster and tests/training, with SLURM and hosts.
FIRST_TESTS := $(addprefix tests/,data_shards model retrieval pretrain finetune experiments)
PACKAGES := common training cluster data_shards model pretrain finetune experiments retrieval priorclip demo benchmarks tests docs setup.py

.PHONY: demo rsicd test lint format docs install clean

demo: $(READY)
	@cluster/system-packages packages.txt run
	$(BIN)/python -m demo --source $(SOURCE) $(if $(DATA),--data $(DATA))

# The best row of docs/evidence.md, from RSICD's images: runs/rsicd/export and runs/rsicd/report.json.
rsicd: SOURCE := rsicd
rsicd: demo

# Runs the suite in two processes side by side. The first one writes into a log, which is shown at the end; bash would make
# it ignore Ctrl-C. PYTEST="tests/model -k belief" runs a part in one process.
test: install lint
ifdef PYTEST
	$(BIN)/python -m pytest $(PYTEST)
else
	@log=$$(mktemp); \
	env --default-signal=INT OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FIRST_TESTS) > $$log 2>&1 & first=$$!; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(FIRST_TESTS)); second=$$?; \
	wait $$first; first=$$?; cat $$log; rm $$log; \
	[ $$first -eq 0 ] && [ $$second -eq 0 ]
endif

lint: $(READY)
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)

# The site of docs/, with the reference made from the code: build/site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "read build/site/index.html, or with a search, and as you write: $(BIN)/mkdocs serve"

install: $(READY)
	@cluster/system-packages packages.txt

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "[1/2] torch"
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch torchvision
	@echo "[2/2] everything else"
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[test,demo-weights]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
