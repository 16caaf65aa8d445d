# Two commands are enough: `make serve` and `make test`. Both install what they need into .venv.

CONFIG ?= configs/smollm2_135m.py
HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8500
LOCK ?= runtime
ARGS ?=
PYTEST_ARGS ?=
# Files of tests in so many processes, each of which takes what memory a model needs; in the order of
# tests/conftest.py.
PYTEST_WORKERS ?= --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
pytest_args = $(PYTEST_WORKERS) --durations=30 $(PYTEST_ARGS)

export PYTHONUNBUFFERED = 1
bin := .venv/bin
sources := jserve configs tests benchmarks examples scripts
protos := $(wildcard jserve/proto/*.proto)
compile = $(bin)/uv pip compile $(ARGS) --quiet --universal --generate-hashes --no-emit-index-url \
	--no-annotate --fork-strategy fewest --python-version 3.11 --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help serve test test-world test-newest check format lint types contracts tpu-compile gpu-compile gpu-check sweep sharding references lock proto clean

help: ## Shows this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: ## Serves CONFIG on HOST, HTTP_PORT and GRPC_PORT; LOCK=cuda or tpu for an accelerator
	@scripts/bootstrap.sh $(LOCK)
	@$(bin)/python -m jserve --config=$(CONFIG) --host=$(HOST) --http_port=$(HTTP_PORT) \
		--grpc_port=$(GRPC_PORT) $(ARGS)

test: check ## Runs every check and the test suite (PYTEST_ARGS=… for pytest)
	@scripts/test.sh $(bin)/python $(pytest_args)

test-world: ## Runs official clients, each group in its own environment, against a server (PYTEST_ARGS=…)
	@scripts/bootstrap.sh dev
	@scripts/world.sh $(bin)/python $(PYTEST_ARGS)

test-newest: ## Runs the suite with the newest JAX and the newest of all else on PYTHON (PYTHON=python3.13)
	@scripts/bootstrap.sh newest .venv-newest
	@scripts/test.sh .venv-newest/bin/python $(pytest_args) --no-fold-skipped

check: ## Format, lint, types, import contracts
	@$(MAKE) --no-print-directory --jobs=2 lint types contracts

lint:
	@scripts/bootstrap.sh dev
	@$(bin)/ruff format --check $(sources)
	@$(bin)/ruff check $(sources)

types:
	@scripts/bootstrap.sh dev
	@$(bin)/pyright

contracts:
	@scripts/bootstrap.sh dev
	@$(bin)/lint-imports --no-cache

format: ## Formats the code and applies safe lint fixes
	@scripts/bootstrap.sh dev
	@$(bin)/ruff check --fix $(sources)
	@$(bin)/ruff format $(sources)

tpu-compile: ## Compiles kernels and whole engines for TPU v5e, v5p and v6e; needs no TPU
	@scripts/bootstrap.sh dev
	@$(bin)/python -m tests.tpu_compile.programs
	@$(bin)/python -m tests.tpu_compile.matmuls
	@$(bin)/python -m tests.tpu_compile.engines

sharding: ## Checks the tokens of every model family over every mesh of eight fake devices
	@scripts/bootstrap.sh dev
	@$(bin)/python -m tests.sharding.families $(ARGS)

sweep: ## Runs the tests that go deeper than `make test` does
	@scripts/bootstrap.sh dev
	@$(bin)/python -m pytest -m sweep $(PYTEST_ARGS)

gpu-compile: ## Compiles the GPU kernels for an H200, and reports; needs no GPU, but 4 GB for .venv-cuda
	@scripts/bootstrap.sh cuda .venv-cuda
	@.venv-cuda/bin/python -m tests.gpu_compile.programs $(ARGS)

gpu-check: ## On a Hopper GPU: checks every kernel, measures kernels and engine; needs no .venv
	@python3 -m tests.gpu_check $(ARGS)

references: ## Makes the reference fixtures again with PyTorch and compares (ARGS=--write replaces them)
	@scripts/references.sh $(ARGS)

lock: ## Resolves requirements/*.txt again (ARGS=--upgrade for newer versions)
	@scripts/bootstrap.sh dev
	$(compile) pyproject.toml --group build -o requirements/runtime.txt
	$(compile) pyproject.toml --group build --extra dev -c requirements/runtime.txt -o requirements/dev.txt
	$(compile) pyproject.toml --group build --extra cuda -c requirements/runtime.txt -o requirements/cuda.txt
	$(compile) pyproject.toml --group build --extra tpu -c requirements/runtime.txt -o requirements/tpu.txt
	$(compile) requirements/clients-newest.in -o requirements/clients-newest.txt
	$(compile) requirements/clients-pinned.in -o requirements/clients-pinned.txt

proto: ## Generates the stubs of jserve/proto
	@scripts/bootstrap.sh dev
	$(bin)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --pyi_out=. $(protos)

clean: ## Removes what make has made, the weights cache excepted
	rm -rf .venv .venv-newest .venv-cuda .venv-references .venv-clients-* jserve/pallas_kernels/native/build .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
