# `make` lists the targets. Each makes the environment it needs, and only when it is missing or
# pyproject.toml has changed.
#
#   make test ARGS="-k tree"        arguments for the program that the target runs
#   make test PYTHON=python3.12     another interpreter, in an environment of its own (.venv-3.12)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve demo-data train test check aot bench clean

# A name on the PATH may be a stub that fails, or a Python that cannot make environments: try it.
USABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
ifeq ($(strip $(PYTHON)),)
override PYTHON := $(shell for python in python3.11 python3.12 python3 python; do \
	$$python -c '$(USABLE)' >/dev/null 2>&1 && echo $$python && break; done)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
endif

BIN := $(VENV)/bin
RUN := $(VENV)/.installed
TRAIN := $(VENV)/.installed-train
DEV := $(VENV)/.installed-dev
# The CUDA plugin in a folder of its own: found by itself it would look for a driver at every start.
AOT := $(VENV)/aot
CONFIG := configs/smollm2_eagle_cpu.yaml
# Permissive text to train on: of packages that the trainer brings in any case.
PACKAGES := numpy,scipy,jax,flax,optax,orbax-checkpoint,einops,jinja2,typer,rich,grain,matplotlib
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN) ## fetch a model and answer prompts with tree speculation
	@$(BIN)/jax-eagle demo $(ARGS)

serve: $(RUN) ## serve a model over HTTP, as OpenAI's API does (ARGS="--help" lists the flags)
	@$(BIN)/python -m serve.server $(ARGS)

demo-data: $(TRAIN) ## make the data that `make train` takes; started again, it goes on
	@$(BIN)/python -m train.library_text --packages $(PACKAGES) \
	--text-out runs/data/library_text.jsonl --chat-out runs/data/library_chat.jsonl
	@$(BIN)/python -m train.prompts --packages $(PACKAGES) --count 5440 --self-share 0.7 --seed 7 \
	--out runs/data/prompts.jsonl
	@$(BIN)/python -m train.regenerate --prompts runs/data/prompts.jsonl --seed 7 --sampled-share 0 \
	--out runs/data/dialogues.jsonl

train: $(TRAIN) ## train a draft (CONFIG=configs/X.yaml, ARGS="--resume")
	@$(BIN)/python -m train.train --config $(CONFIG) $(ARGS)

test: $(DEV) ## run the test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(DEV) ## check format, lint, types and import directions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo

aot: $(AOT)/.installed ## compile for a described H100, without a GPU; check registers, memory, collectives
	@PYTHONPATH=$(AOT) $(BIN)/python -m pytest -m aot tests/test_aot.py tests/test_aot_matmul.py tests/test_aot_train.py $(ARGS)

bench: $(RUN) ## measure speed with and without speculation
	@$(BIN)/jax-eagle bench $(ARGS)

clean: ## remove environments, caches and build output (runs/ stays)
	@rm -rf .venv .venv-* build dist *.egg-info
	@rm -rf .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed environments, caches and build output"

# bin/pip is the last file that venv writes: an interrupted start is made again.
$(BIN)/pip:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(USABLE)' >/dev/null 2>&1 || { echo \
	"No usable Python ('$(PYTHON)'): 3.11 or 3.12 with its venv module is needed; name one with make PYTHON=..." \
	>&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml | $(BIN)/pip
	@echo "Installing jax-eagle into $(VENV) (about a minute)"
	@$(INSTALL) --editable '.[serve]'
	@touch $@

$(TRAIN): pyproject.toml | $(BIN)/pip
	@echo "Installing jax-eagle and its trainer into $(VENV) (about a minute)"
	@$(INSTALL) --editable '.[train]'
	@touch $@

$(DEV): pyproject.toml | $(BIN)/pip
	@echo "Installing jax-eagle and its development tools into $(VENV) (about a minute)"
	@$(INSTALL) --editable '.[dev]'
	@touch $(RUN) $(TRAIN) $@

$(AOT)/.installed: $(DEV)
	@echo "Installing the CUDA plugin into $(AOT) (half a minute)"
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(INSTALL) --no-deps --upgrade --target $(AOT) jax-cuda13-plugin==$$version \
	jax-cuda13-pjrt==$$version nvidia-cuda-nvcc
	@touch $@
