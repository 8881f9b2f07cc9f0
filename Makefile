# make demo    set up, then images → .beton → pretraining → accuracy, on this machine, in minutes
# make test    set up, then the tests
SHELL := /bin/bash
BIN := .venv/bin
JOBS ?= auto
FUZZ_CASES ?= 200000
test test-slow-faults test-all reliability bench bench-quick: export OMP_NUM_THREADS ?= 1
# Threads that wait for one another soon sleep, so that a busy machine does not stall them.
export GOMP_SPINCOUNT ?= 1000

.PHONY: setup setup-dev demo test test-slow-faults test-all reliability check bench bench-quick format lock clean

setup:
	@tools/setup.sh user

setup-dev:
	@tools/setup.sh dev

demo: setup
	@$(BIN)/python -m tools.demo

test: setup-dev
	$(BIN)/python -m pytest -n $(JOBS)

test-slow-faults: setup-dev  # the fault tests that `make test` leaves out
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu" tests/reliability

test-all: setup-dev  # with the widest sweeps
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu"

reliability: setup-dev  # the fault tests, slow ones included, and their table
	@rm -f runs/reliability.jsonl && mkdir -p runs
	TWINVIEW_RECORD=$(CURDIR)/runs/reliability.jsonl TWINVIEW_FUZZ_CASES=$(FUZZ_CASES) \
	    $(BIN)/python -m pytest -n 2 -m "not gpu" tests/reliability
	$(BIN)/python -m tests.reliability.record runs/reliability.jsonl > docs/results/reliability.md

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: setup-dev  # every race, minutes
	$(BIN)/python -m pytest benchmarks -p no:xdist -s

bench-quick: setup-dev  # the most telling ones, two minutes
	$(BIN)/python -m pytest benchmarks -p no:xdist -s --bench-quick

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup-dev  # constraints.txt: the newest versions that the ranges allow
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-header --annotation-style=line \
	    requirements-dev.txt -o constraints.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
