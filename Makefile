# The two commands: `make compare` and `make test`. Each makes its own .venv with pinned requirements.
#   TORCH_INDEX=URL   take torch from this index (for example PyTorch's CPU or CUDA wheel index)
#   PYTHON=python3.12 choose the interpreter that makes the environment
#   ARGS="..."        further arguments of `foveate compare` or pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q
TORCH := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PINS := pyproject.toml constraints.txt
OUT ?= compare

.DEFAULT_GOAL := help
.PHONY: help compare test test-all lint docs bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

compare: $(VENV)/.compare  ## which attention fits this machine? writes compare/report.html
	$(BIN)/foveate compare --out $(OUT) $(ARGS)

test: $(VENV)/.test  ## the test suite, under ten minutes on two cores
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.test  ## everything: 500 hypothesis examples, browser, short trainings
	FOVEATE_ALL=1 FOVEATE_HYPOTHESIS=all $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## regenerate the catalogue and pictures, build site/
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.compare  ## speed ratios of the kernels, side by side in one run
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist site $(OUT) .pytest_cache .ruff_cache .hypothesis

$(VENV)/.base: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "foveate needs Python 3.11 or newer; '$(PYTHON)' is not. Install one, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' has no venv module. On Debian or Ubuntu run: sudo apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (the first time this is the long step)"
	$(PIP) pip
	$(PIP) $(TORCH) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.compare: $(VENV)/.base
	$(PIP) -e '.[compare]'
	@touch $@

$(VENV)/.test: $(VENV)/.compare
	$(PIP) -e '.[compare,test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff pyright
	@touch $@

$(VENV)/.docs: $(VENV)/.compare
	$(PIP) -e '.[compare,docs]'
	@touch $@
