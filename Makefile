# `make` alone explains the targets. Everything is set up inside ./.venv and nothing outside this folder is touched.

PYTHON ?= python3
WORKERS ?= 2
BENCH_FLAGS ?= --quick
DEMO_FLAGS ?=
FAULTS_FLAGS ?=
PYTEST_FLAGS ?=

BIN := .venv/bin
READY := .venv/.ready
# Files that start with an underscore are shared by benchmarks; those that end in _gpu need one.
BENCHMARKS := $(sort $(filter-out %_gpu.py benchmarks/_%,$(wildcard benchmarks/*.py)))

.PHONY: help setup demo test check parity faults bench interop clean
.DEFAULT_GOAL := help

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## install Ostro and its tools into .venv (again only when pins or dependencies change)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "PYTHON=$(PYTHON) is not on the PATH: install Python 3.11 or newer, or name one with make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Ostro needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1): name another with make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
		echo "$(PYTHON) could not make .venv: on Debian and Ubuntu install python3-venv first." >&2; exit 1; }
# torch goes first and pinned: a bare name or a range would pick a build of several gigabytes for GPUs.
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 hatchling editables
# Without isolation the build backend is the pinned one, whatever the age of pip.
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,tensorboard]'
	@touch $@

demo: $(READY) ## prepare, train, resume, evaluate, export and write text: the main job in minutes
	$(BIN)/ostro demo $(DEMO_FLAGS)

test: check ## lint and types, then every test on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(PYTEST_FLAGS)

check: $(READY) ## ruff, its formatter, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

parity: $(READY) ## every layout against one process, its table into docs/parallel.md (minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/parallel/table.py --write
	OMP_NUM_THREADS=1 OSTRO_PARITY=1 $(BIN)/python -m pytest -q tests/parallel/test_layouts.py -k compiled

faults: $(READY) ## kill ranks of real trainings and compare what comes out, the log into docs/parallel.md (10 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/parallel/faults.py --write $(FAULTS_FLAGS)

bench: $(READY) ## every benchmark that needs no GPU (BENCH_FLAGS= for the long runs)
	@for file in $(BENCHMARKS); do echo "$$file"; $(BIN)/python $$file $(BENCH_FLAGS) || exit 1; done

interop: $(READY) ## MindSpore, llama.cpp, bitsandbytes, lm-eval and Chromium beside Ostro, each against ours (4 GB of packages, minutes)
	@test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install -q 'mindspore==2.10.0' 'numpy==1.26.4'
	@test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install -q 'llama-cpp-python==0.3.36'
	$(BIN)/python tests/interop/mindspore.py --mindspore-python .venv-interop/bin/python
	$(BIN)/python tests/interop/llama.py --python .venv-llama/bin/python
	@test -x .venv-bnb/bin/python || $(PYTHON) -m venv .venv-bnb
	.venv-bnb/bin/python -m pip install -q torch==2.13.0
	.venv-bnb/bin/python -m pip install -q 'bitsandbytes==0.50.0' safetensors
	.venv-bnb/bin/python tests/interop/nf4.py
	@test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install -q -c constraints.txt torch==2.13.0 hatchling editables
	.venv-lm-eval/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[eval]' transformers
	.venv-lm-eval/bin/python tests/interop/lm_eval_side.py
	$(BIN)/python tests/interop/browser.py

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
