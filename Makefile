# `make train` and `make test` work in a fresh clone. They need only Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin
PARALLEL = -n auto --maxprocesses=4 --dist=worksteal

train: .venv/run  ## train on generated facts, two minutes on two cores; continues a stopped run
	$(BIN)/python train.py --resume

model: .venv/run  ## the trained model of docs/explorer.html as a checkpoint in out/demo, without training
	$(BIN)/python -m explorer.unpack

evidence-quick: .venv/run  ## dense, memory as published, the best of ours: ten minutes on two cores
	$(BIN)/python -m experiments.compare facts --models=dense,memory+,tokens --lrs=4e-3 --seeds=1 \
		--max_steps=1500 --results=out/evidence

test: .venv/dev  ## all tests except the slow ones
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow

lint: .venv/dev  ## style, and the types of the idea files
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: nanoPKM needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

.PHONY: train model evidence-quick test test-slow lint
