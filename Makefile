# Needs Python 3.11, pip, gcc, make and git; everything else goes into .venv. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
PROCESSES ?= 2
RUNS ?= runs/symbiotic
STUDY ?= none
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER := $(VENV)/.browser
NOTEBOOKS := $(VENV)/.notebooks
PEER := $(VENV)/.peer
BENCH := $(VENV)/.bench
BENCHMARKS := moe_layer attention training_step scaling startup sampling loader overhead

# One thread a process: the models are small, and processes side by side use the cores better.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup train eval study test test-slow test-peer torture test-slurm test-browser notebooks bench bench-more golden check format clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the project with its development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

train: $(STAMP) ## set up, then run the main job; more in ARGS, e.g. make train ARGS="seed=1 system=bagel"
	$(BIN)/python src/train.py experiment=symbiotic $(ARGS)

eval: $(STAMP) ## audit, measure and report the runs below RUNS; e.g. make eval RUNS=runs/main_job STUDY=none ARGS="evaluation=embedded"
	$(BIN)/python src/eval.py runs=$(RUNS) study=$(STUDY) $(ARGS)

study: $(STAMP) ## run a study, what is left of it, and write its report; e.g. make study STUDY=systems PROCESSES=2 ARGS="seed=0"
	@test "$(STUDY)" != none || { echo "error: STUDY is missing; one of: $$(cd conf/study && ls *.yaml | sed 's/.yaml//' | grep -v none | xargs)" >&2; exit 2; }
	$(BIN)/python src/train.py study=$(STUDY) hydra/launcher=joblib hydra.launcher.n_jobs=$(PROCESSES) threads=1 $(ARGS)

# Each file of tests in one process: what its tests share (a trained run, a report) is then made once.
test: $(STAMP) ## set up, then run the default tests in 2 processes; more in ARGS
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow -n $(PROCESSES) $(ARGS)

test-peer: $(PEER) ## hold the pretrained families against transformers: logits, files, generation
	$(BIN)/python -m pytest -m peer tests/peer tests/images $(ARGS)

$(PEER): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[hf]'
	@touch $@

torture: $(STAMP) ## hundreds of kills, signals, damaged files and lost ranks; nothing may be lost (hours; fewer: ARGS="kills=40 only=R1,R9")
	$(BIN)/python tests/torture.py $(ARGS)

test-slurm: $(STAMP) ## submit jobs to a SLURM of one node on loopback, from Debian's packages; as root
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

test-browser: $(BROWSER) ## open the HTML reports in a headless Chromium from Debian's packages; REPORT=FILE for a given one too
	CHROMIUM=$${CHROMIUM:-$$(tests/browser/chromium.sh $(VENV)/chromium)} && export CHROMIUM && \
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

$(BROWSER): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[browser]'
	@touch $@

notebooks: $(NOTEBOOKS) ## execute the notebooks, one after the other, on one core; what they show is left in build/notebooks
	$(BIN)/python notebooks/execute.py $(ARGS)

$(NOTEBOOKS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[notebooks]'
	@touch $@

bench: $(BENCH) ## speed beside peers, as tables in build/bench (an hour on an idle machine; minutes: ARGS=--quick)
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS); done

bench-more: $(STAMP) ## what monitors, checkpoints, checks and conversion cost, and the forecast's efficiency (minutes)
	$(BIN)/python benchmarks/monitors.py $(ARGS)
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/forecast.py

$(BENCH): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	@touch $@

golden: $(STAMP) ## write the golden losses of the installed torch, after a change that is meant to change them
	SYMBIOTIC_WRITE_GOLDEN=1 $(BIN)/python -m pytest -q tests/test_arc.py -k golden

check: $(STAMP) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply style fixes and the format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build output; .venv, runs, data and cached parents stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +
