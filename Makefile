# make train | make test | make test-all | make lint | make reproduce | make reproduce-quick
# PYTHON=python3.12 picks the interpreter
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
RUN ?= runs/tiny
CONFIG ?= configs/tiny.py
# Every test file on one worker: its compiled programs are shared inside a process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile

.PHONY: train test test-all lint reproduce reproduce-quick clean

train: $(VENV)/installed
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(RUN)
	$(BIN)/python eval.py --workdir=$(RUN) --step=best --split=test
	@echo "the run's picture: $(RUN)/report.png"

test: $(VENV)/installed-dev
	$(PYTEST)

test-all: $(VENV)/installed-dev
	@# The extra brings the libtpu of this jax: the TPU compiler, for programs of pods. A newer one can't always be read.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,hf,lm-eval,tpu]"
	$(PYTEST) -m "full or not full"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@case "$(VERSION)" in 3.11|3.12|3.13) ;; *) \
	  echo "error: $(PYTHON) is Python $(VERSION); Python 3.11, 3.12 or 3.13 is needed, as in PYTHON=python3.12 make train" >&2; exit 2;; esac
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/installed

# The paper's experiments on a shaped network (docs/reproduction.md): root, iproute2, a machine without other work.
reproduce: $(VENV)/installed
	$(BIN)/python -m benchmarks.reproduce

reproduce-quick: $(VENV)/installed
	$(BIN)/python -m benchmarks.reproduce --quick

clean:
	rm -rf $(VENV) build *.egg-info
