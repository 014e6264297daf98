# `make demo` and `make test` are all a fresh machine needs: each makes .venv first if it is missing or out of date.
# Another interpreter: make test PYTHON=python3.12    More arguments: make test ARGS="tests/test_noise.py -x"

PYTHON ?= python3
ARGS ?=
MODEL ?=
RUN := .venv/bin/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench ci clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: ## make .venv with vLLM (CPU or CUDA, whichever fits), this package and the test tools
	@bash ci/install.sh

demo: install ## fine-tune a small OPT model inside vLLM (MODEL=smollm2: a real one); writes an adapter and run.png
	@$(RUN) examples/demo.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: install ## the tests, without the slow ones, in two processes (WORKERS=1: in one)
	@bash ci/test.sh $(ARGS)

test-slow: install ## soaks, long convergence runs, a real model; says what it could not run
	@bash ci/test.sh --run-slow -m slow --timeout 3600 -rs $(ARGS)

lint: install ## ruff (rules and format), mypy and the import contracts
	@bash ci/lint.sh

format: install ## rewrite the files as ruff formats them
	@$(RUN) -m ruff check --fix-only .
	@$(RUN) -m ruff format .

bench: install ## ms per step, against the baselines
	@$(RUN) benchmarks/core_step.py $(ARGS)

ci: ## everything CI runs
	@bash ci/run.sh

clean: ## remove caches and build outputs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv
