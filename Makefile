# Needs Python 3.11 or 3.12, gcc and make. Everything else is installed into $(VENV).
#
#   make chat     start the service, quantize SmolLM2, serve it, and talk to it beside its original
#   make demo     start the service, quantize SmolLM2 over HTTP, check the result, stop
#   make test     lint, types, import rules and every test
#   make tasks    install lm-eval, for `evaluation.tasks` and its tests
#   make judges   our files opened and served by vLLM and llama.cpp, which it installs
#   make clients  the clients that users bring, against a deployment; it installs them
#   make quick    what changed, with its unit tests alone, in under a minute
#
#   make latest   the tests against the newest versions that pyproject.toml admits
#   make lock     record those versions in constraints.txt
#
# PYTHON=/path/to/python3.12 picks the interpreter, VENV=folder the environment.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
VERSIONS ?= recorded
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SERVICE := $(VENV)/service-installed
# A Python 3.11 and a Python 3.12, for which `make lock` resolves.
LOCK_PYTHONS ?= python3.11 python3.12
# Each test process computes with one thread. Three keep two cores busy, since tests wait for processes that start
# (480 s; with two processes 560 s).
PYTEST_WORKERS ?= 3
# Where the environments of judges are, and which of their forms runs: short or long.
JUDGES ?= .judges
CLIENTS ?= .clients
FORM ?= short
# A file stays in one process: what its tests share (a service, a quantized model) is made once. Files are taken in
# the order of testpaths, long ones first, so that all processes end at about the same time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install tasks chat demo test judges clients quick latest lock lint format types imports unit integration faults fuzz families guards e2e gpu gpu-wheels bench clean

help:
	@sed -n '3,13s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# The versions that constraints.txt records, or with VERSIONS=newest what pyproject.toml admits. What the service
# needs comes first: a conversation does not wait for the tools of the tests.
$(SERVICE): pyproject.toml constraints.txt .ci/install .ci/find-python
	@test -x $(BIN)/python || "$$(.ci/find-python $(PYTHON))" -m venv $(VENV)
	.ci/install $(VENV) $(VERSIONS) all
	touch $(SERVICE)

$(STAMP): $(SERVICE)
	.ci/install $(VENV) $(VERSIONS) dev
	touch $(STAMP)

# lm-eval and what it needs take a minute and 500 MB, so only those who score tasks have it.
tasks: $(STAMP)
	$(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint $(VENV)/constraints.txt \
		--editable '.[tasks]'

# PROMPT="Who was Ada Lovelace?" asks one question instead of holding a conversation; without a terminal that is the default.
# MODEL=bundled takes the small model of this repository, as both do where SmolLM2 can't be had.
MODEL ?= smollm2
chat: $(SERVICE)
	@$(BIN)/python examples/chat.py --model $(MODEL) "$(PROMPT)"

demo: $(SERVICE)
	$(BIN)/python examples/demo.py --model $(MODEL)

test: lint types imports $(STAMP)
	$(PYTEST)

# Programs that are not ours judge our files, each in an environment of its own (JUDGES=folder). FORM=long judges every
# group size and method; with RECORD=1 it writes the guide's table anew. FAMILIES=1 judges a tiny model of each family
# that tests/judges/family_results.json lacks.
judges: $(STAMP)
	tests/judges/install $(BIN)/python $(JUDGES) vllm llama_cpp
ifdef FAMILIES
	JUDGES=$(JUDGES) OMP_NUM_THREADS=1 $(BIN)/python -m tests.judges.families
else
	JUDGES=$(JUDGES) FORM=$(FORM) OMP_NUM_THREADS=1 $(BIN)/pytest tests/judges --timeout 3600
endif

# Clients that are not ours against a deployment, each in a folder of its own (CLIENTS=folder, 2.4 GB) with the versions of
# tests/clients/versions. RECORD=1 writes the guide's table anew.
clients: $(STAMP)
	tests/clients/install $(BIN)/python $(CLIENTS)
	CLIENTS=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/pytest tests/clients

# While one works: it needs no service but a Valkey of its own, and says how much time it took.
quick: $(STAMP)
	@$(BIN)/python -m tests.quick

# An environment of its own, made anew each time: what the tests say of it is what a release will meet.
latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest VERSIONS=newest

lock:
	.ci/lock $(LOCK_PYTHONS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(PYTEST) tests/unit tests/architecture

integration: $(STAMP)
	$(PYTEST) tests/integration

# The long form of the fault suite: FAULTS injected faults in the course that SEED chooses.
faults: $(STAMP)
	FAULTS=$${FAULTS:-200} SEED=$${SEED:-1} OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults -s --timeout 3600

# The long form of what is made up at random: EXAMPLES requests per operation from the service's own description,
# FUZZ inputs for each parser that strangers reach.
fuzz: $(STAMP)
	EXAMPLES=$${EXAMPLES:-30} FUZZ=$${FUZZ:-20000} OMP_NUM_THREADS=1 $(BIN)/pytest \
		tests/integration/test_openapi.py tests/unit/app/core/test_fuzz.py --timeout 3600

# Takes away each guard against attacks, one at a time: its test must fail.
# Tiny models of every family: quantized, opened by transformers, served; writes docs/models.md. About half an hour.
families: $(STAMP)
	FAMILIES=all $(BIN)/pytest tests/integration/test_discovery.py -n 0 --timeout 3600
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.serving
	$(BIN)/python -m tests.families.page

guards: $(STAMP)
	$(BIN)/python -m tests.attacks.prove

e2e: $(STAMP)
	$(BIN)/pytest tests/e2e

# On a host with a GPU, with the Python and PyTorch that are there; nothing is installed. WHEELS=folder brings what
# they lack, from `make gpu-wheels` on a host that reaches a registry.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,python3)
WHEELS ?=
gpu:
	$(GPU_PYTHON) tests/benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

gpu-wheels: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu_wheels.py $(or $(WHEELS),gpu-wheels)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/quantize.py

clean:
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find app workers kernels tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
