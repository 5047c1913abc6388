# Everything runs from a virtual environment in .venv; PYTHON picks the interpreter it is made with (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= config/embedded.toml
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
PREFIX ?= /opt/warmpool
EXTRAS ?=
# Where `make bench` writes.
BENCH := build/loadtest
# Where `make vllm-cpu` puts the environment and the model, or finds them.
VLLM_CPU_VENV ?= /var/tmp/warmpool-vllm-cpu/venv
VLLM_CPU_MODEL ?= /var/tmp/warmpool-vllm-cpu/model

# Most tests wait for processes: two for each CPU are twice as fast as one.
WORKERS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 8 : 2 * n)))

.PHONY: help run test test-model test-faults fuzz lint format reference install dist host vllm-cpu test-vllm llama-cpp test-engines bench bench-vllm bench-proxy bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.run ## start warmpool with the embedded configuration on 127.0.0.1:8080
	@echo 'Starting warmpool with $(CONFIG). The log follows; Ctrl-C ends it.'
	@$(BIN)/warmpool serve --config $(CONFIG)

test: $(VENV)/.dev lint ## lint, types and all tests; containers and CRIU after the others, three at a time
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'not vllm and not engines and not podman and not criu'
	$(BIN)/pytest -n 3 --dist loadgroup -m 'not vllm and not engines and (podman or criu)'

fuzz: $(VENV)/.dev ## malformed requests and answers for FUZZ_SECONDS (300) each, and FUZZ_CONNECTIONS (100000); engine and warmpool compared for DIFFERENTIAL_SECONDS (300); EXAMPLES (20) times as many examples of hypothesis
	FUZZ_SECONDS=$${FUZZ_SECONDS:-300} FUZZ_CONNECTIONS=$${FUZZ_CONNECTIONS:-100000} \
		DIFFERENTIAL_SECONDS=$${DIFFERENTIAL_SECONDS:-300} $(BIN)/pytest -s tests/server/test_fuzz.py tests/server/test_differential.py
	EXAMPLES=$${EXAMPLES:-20} $(BIN)/pytest -n logical --timeout 0 -m 'hypothesis and not vllm and not engines and not podman and not criu'

test-model: $(VENV)/.dev ## scheduling and the pool against random events and faults in virtual time: SCHEDULING_EXAMPLES (1000) runs of 60 steps, POOL_EXAMPLES (1000) of 40
	SCHEDULING_EXAMPLES=$${SCHEDULING_EXAMPLES:-1000} SCHEDULING_STEPS=60 POOL_EXAMPLES=$${POOL_EXAMPLES:-1000} POOL_STEPS=40 \
		$(BIN)/pytest -s --timeout 0 --hypothesis-show-statistics tests/pool/test_scheduling_model.py tests/pool/test_pool_model.py

test-faults: $(VENV)/.dev ## (root) each fault at each stage under load, with processes and podman: FAULTS_ROUNDS (1), an hour each
	FAULTS_ROUNDS=$${FAULTS_ROUNDS:-1} $(BIN)/pytest -s -m 'criu or podman' tests/faults

lint: $(VENV)/.dev ## ruff (lint and format), mypy, and the contracts between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.run ## write config/reference.toml and docs/reference.md from the code
	$(BIN)/warmpool config reference > config/reference.toml
	$(BIN)/warmpool config reference --format markdown > docs/reference.md

install: ## (root) put warmpool into /opt/warmpool (PREFIX, EXTRAS=gpu), for systemd; again to upgrade
	systemd/install.sh $(PREFIX) $(PYTHON) $(EXTRAS)

dist: $(BIN)/python ## a wheel and the sources, to install elsewhere, in dist
	@$(INSTALL) 'hatchling>=1.25'
	$(BIN)/python -m hatchling build --directory dist

host: ## (root) install podman and CRIU on Debian 12 or 13
	systemd/host-setup.sh

vllm-cpu: $(BIN)/python ## (root) install vLLM for the CPU, make a small model and a container image (3 minutes, 7 GB)
	$(BIN)/python -m loadtest.vllm_cpu --venv $(VLLM_CPU_VENV) --model $(VLLM_CPU_MODEL)

test-vllm: $(VENV)/.dev vllm-cpu ## (root) the tests with the real vLLM in containers (3 minutes)
	VLLM_CPU_VENV=$(VLLM_CPU_VENV) VLLM_CPU_MODEL=$(VLLM_CPU_MODEL) $(BIN)/pytest tests/vllm -m vllm --log-cli-level=INFO

llama-cpp: $(BIN)/python ## install llama.cpp's server, make a small model and (root) a container image (40 seconds, 250 MB)
	$(BIN)/python -m loadtest.llama_cpp

test-engines: $(VENV)/.dev llama-cpp ## (root) the tests with an engine that is not vLLM, as a process and in containers (3 minutes)
	$(BIN)/pytest tests/engines tests/engine/test_kinds.py -m 'engines or not engines'

bench: $(VENV)/.loadtest ## load tests, a short tour (4 minutes): samples and a page in build/loadtest
	$(BIN)/python -m loadtest restore --out $(BENCH)/restore.jsonl
	$(BIN)/python -m loadtest burst --load 2 --rounds 1 --out $(BENCH)/burst.jsonl
	$(BIN)/python -m loadtest trace tests/data/trace.csv --models 3 --out $(BENCH)/trace.jsonl
	$(BIN)/python -m loadtest report $(BENCH)/restore.jsonl $(BENCH)/burst.jsonl $(BENCH)/trace.jsonl --html $(BENCH)/report.html

bench-vllm: $(VENV)/.dev vllm-cpu ## (root) measure the real vLLM in containers: JSON in build/vllm-cpu.json, a table on the terminal
	$(BIN)/python -m loadtest.bench_vllm_cpu --model $(VLLM_CPU_MODEL) --json build/vllm-cpu.json

bench-proxy: $(VENV)/.run ## two cores: warmpool beside nginx, vLLM's router and LiteLLM (10 minutes), or beside another checkout (BESIDE=../old)
	$(BIN)/python -m loadtest.bench_proxy $(if $(BESIDE),--beside $(BESIDE)) $(if $(BESIDE_PYTHON),--beside-python $(BESIDE_PYTHON))

bench-gpu: $(VENV)/.run ## (root) measure every tier on a GPU: make bench-gpu CONFIG=your.toml
	$(INSTALL) --editable '.[gpu]'
	$(BIN)/python -m loadtest.bench_gpu --config $(CONFIG)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warmpool needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@echo 'Making a virtual environment in $(VENV) ...'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

$(VENV)/.run: $(BIN)/python pyproject.toml
	@echo 'Installing warmpool and what it needs into $(VENV) (once, and after changes of pyproject.toml) ...'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.loadtest: $(BIN)/python pyproject.toml
	@echo 'Installing warmpool with the extra loadtest into $(VENV) ...'
	@$(INSTALL) --editable '.[loadtest]'
	@touch $@ $(VENV)/.run

$(VENV)/.dev: $(BIN)/python pyproject.toml
	@echo 'Installing warmpool with what its tests need into $(VENV) ...'
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.run $(VENV)/.loadtest
