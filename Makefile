# One command for each habit; CI calls the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Runs of the demo and of the benchmarks must not depend on what the shell exports.
export PYTHONHASHSEED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test check format bench clean

help:
	@echo "make demo    set up, train the embedded model, evaluate before and after"
	@echo "make test    set up, run the whole test suite"
	@echo "make check   ruff and mypy"
	@echo "make format  ruff format and fix"
	@echo "make bench   the figures of README and docs (about half an hour)"

install: $(STAMP)

# The stamp makes a second call need neither network nor time.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "estune needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/demo_gain.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
