# make train, make test: from a bare clone, with Python 3.11 or newer and nothing else installed.
PYTHON ?= python3
BIN = .venv/bin

train: .venv/run  ## train on generated facts, two minutes on two cores; continues a run that was stopped
	$(BIN)/python train.py --resume

test: .venv/dev  ## all tests except the slow ones
	$(BIN)/python -m pytest

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: nanoPKM needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

.PHONY: train test test-slow lint
