# make train | make env | make test | make test-programs | make test-programs-gpu | make test-all | make test-part | make smoke | make lint | make reproduce | make reproduce-quick | make quality
# PYTHON=python3.12 picks the interpreter
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
RUN ?= runs/tiny
CONFIG ?= configs/tiny.py
# Every test file on one worker: its compiled programs are shared inside a process. In the order of their names: files of
# few and long tests, which xdist would put last, keep one worker busy when the others have ended.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

ENTER = @echo "to enter the environment: source $(VENV)/bin/activate"

.PHONY: train env test test-programs test-programs-gpu test-all test-part smoke lint reproduce reproduce-quick quality clean

train: $(VENV)/installed
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(RUN)
	$(BIN)/python eval.py --workdir=$(RUN) --step=best --split=test
	@echo "the run's picture: $(RUN)/report.png"
	$(ENTER)

# The environment alone.
env: $(VENV)/installed
	$(ENTER)

test: $(VENV)/installed-dev
	$(PYTEST)

# Every program compiled for TPU slices that are not there; PART=0/2 is a half of them, PART=1/2 the other. The extra
# brings the libtpu of this jax, which is the compiler; a newer one can't always be read.
test-programs: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,tpu]"
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses=8 tests/programs -m "tpu and not full" $(if $(PART),--part=$(PART))

# The same for hosts of GPUs; XLA's GPU compiler comes with jax's CUDA plugin (a few GB).
test-programs-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,gpu]"
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses=8 tests/programs -m gpu

# What a user does first, in two minutes, and the tests of what another Python may change: processes, signals, files,
# configs, commands and training. What the model computes is a matter of XLA.
smoke: $(VENV)/installed-dev
	rm -rf runs/smoke runs/smoke-2
	$(BIN)/python train.py --workdir=runs/smoke --config.train.steps=20 --config.train.eval_every=20
	$(BIN)/python eval.py --workdir=runs/smoke --split=validation
	$(BIN)/python generate.py --workdir=runs/smoke --prompt="The state of the Union is" --max_tokens=16
	PYTHON=$(BIN)/python scripts/launch_local.sh 2 --workdir=runs/smoke-2 --config.mesh.expert=2 --config.train.steps=4
	$(PYTEST) tests/training tests/commands tests/config tests/data tests/run tests/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,tpu]"
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses=8 tests/programs/test_tpu.py -m tpu -k every_kind

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,gpu,hf,lm-eval,notebook,tpu]"
	JAX_PLATFORMS=cpu $(PYTEST) -m "full or not full"

# One of sixteen parts of what `make test` leaves out, another one for every tree; what the parent fails too does not count.
test-part: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,hf,lm-eval,notebook,tpu]"
	JAX_PLATFORMS=cpu $(BIN)/python tests/part.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@case "$(VERSION)" in 3.11|3.12|3.13) ;; *) \
	  echo "error: $(PYTHON) is Python $(VERSION); Python 3.11, 3.12 or 3.13 is needed, as in PYTHON=python3.12 make train" >&2; exit 2;; esac
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half of one would be taken for it

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing bigmac_jax and its packages into $(VENV): 1.2 GB, a minute or more"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing bigmac_jax, its packages and those of its tests into $(VENV): 1.8 GB, some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/installed
	$(ENTER)

# The paper's experiments on a shaped network (docs/reproduction.md): root, iproute2, a machine without other work.
reproduce: $(VENV)/installed
	$(BIN)/python -m benchmarks.reproduce

reproduce-quick: $(VENV)/installed
	$(BIN)/python -m benchmarks.reproduce --quick

# What a narrow exchange costs in quality (docs/quality.md): many hours, resumable.
quality: $(VENV)/installed
	$(BIN)/python -m benchmarks.quality --text=embedded

clean:
	rm -rf $(VENV) build *.egg-info
