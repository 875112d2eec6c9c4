# One command for each habit; CI calls the same ones.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# pip compiles bytecode on one core; `COMPILE` does so on all. Some packages contain files that are no valid Python.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
COMPILE = PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 $(abspath $(VENV)/lib) || true
# Stamps make a second call need neither network nor time.
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
# PPO's trainer is in TRL 1.12, beside the TRL of the other methods.
PPO := $(VENV)/lib/estune-ppo
export PYTHONHASHSEED := 0
export TOKENIZERS_PARALLELISM := false

# vLLM needs other versions of common packages, hence an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM := $(VLLM_VENV)/.installed

.PHONY: help install demo test test-e2e test-real test-all vllm test-vllm nightly fuzz check docs format bench bench-check figures clean

help:
	@echo "make demo    set up, train the embedded model, evaluate before and after"
	@echo "make test    set up, run the unit and invariant tests and a miniature of every feature"
	@echo "make test-e2e   comparisons end to end, every kill point, full products of parameters, a short fuzz run"
	@echo "make test-real  real models, the package registry, trackers, a browser, lm-eval"
	@echo "make test-all   the three tiers above in one call, as CI runs them"
	@echo "make vllm    an environment with vLLM on CPUs, in $(VLLM_VENV)"
	@echo "make test-vllm  the vLLM engine's tests, in that environment"
	@echo "make nightly    the same, and records the result in benchmarks/results/nightly.json"
	@echo "make fuzz    1000 random cases against the real commands: data, models, kills, streams (ten minutes or more)"
	@echo "make check   ruff and mypy"
	@echo "make docs    the documentation as pages, in build/site"
	@echo "make format  ruff format and fix"
	@echo "make bench   speed and its targets: kernels, steps, growth of cost (over an hour)"
	@echo "make figures the other figures: memory, the demo's gain, equivalence, conciseness (about 70 minutes)"
	@echo "make bench-check  the fast ratios again, against benchmarks/ratios.json (about 5 minutes)"

install: $(DEV)

define venv
@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "estune needs Python 3.11 or newer; set PYTHON=python3.11")'
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
endef

$(RUNTIME): pyproject.toml constraints.txt
	$(venv)
	$(PIP) -e .
	$(COMPILE)
	touch $(RUNTIME)

# One call of pip for all packages; the runtime is among them.
$(DEV): pyproject.toml constraints.txt
	$(venv)
	$(PIP) -e ".[dev]"
	test -d $(PPO) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(PPO) trl==1.12.0
	$(COMPILE)
	touch $(RUNTIME) $(DEV)

demo: $(RUNTIME)
	$(BIN)/python scripts/demo.py

# Two workers of pytest-xdist, each with one thread.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test: $(DEV)
	$(PYTEST)

test-e2e: $(DEV)
	$(PYTEST) -m e2e

test-real: $(DEV)
	$(PYTEST) -m real tests/integration

# The three tiers in one call: no core waits for the last test of a tier.
test-all: $(DEV)
	$(PYTEST) -m "not vllm"

vllm: $(VLLM)

$(VLLM): pyproject.toml requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt -e .
	touch $(VLLM)

test-vllm: $(VLLM)
	$(VLLM_VENV)/bin/python -m pytest -n 0 -m vllm tests/integration/test_vllm.py

# What takes too long for every change; the last result is tracked in benchmarks/results/nightly.json.
nightly: $(VLLM)
	$(VLLM_VENV)/bin/python benchmarks/record.py vllm -n 0 -m vllm tests/integration/test_vllm.py

fuzz: $(DEV)
	$(BIN)/python scripts/fuzz.py --cases 1000 --seed 0

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEV)
	$(BIN)/python scripts/reference.py cli | cmp - docs/cli.md
	$(BIN)/python scripts/reference.py resuming | cmp - docs/resuming.md
	$(BIN)/python scripts/reference.py trl | cmp - docs/trl.md
	$(BIN)/python scripts/architecture.py --check
	$(BIN)/python scripts/evidence.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BENCH): $(RUNTIME)
	$(PIP) -e ".[bench]"
	touch $(BENCH)

bench: $(BENCH)
	$(BIN)/python benchmarks/bench.py $(if $(PEERS),--peers $(PEERS))

figures: $(BENCH)
	$(BIN)/estune fetch smollm2-135m
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/demo_gain.py whole
	$(BIN)/python benchmarks/demo_gain.py time
	$(BIN)/python benchmarks/equivalence.py
	$(BIN)/python benchmarks/conciseness.py

bench-check: $(BENCH)
	$(BIN)/python benchmarks/bench.py --quick --check

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
