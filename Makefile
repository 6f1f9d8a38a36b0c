# Everything works from a bare checkout: what needs .venv makes it first (scripts/setup.sh; instant once it is there).

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all coverage check docs format clean

WORKERS ?= 2
# The tests of a file run in one worker, where they share its fixtures; tests/conftest.py puts the longest files first.
PYTEST = .venv/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## create or update .venv (PYTHON=... and RLMT_DEVICE=cpu|cuda to choose)
	@scripts/setup.sh

quickstart: setup ## train a miniature world from scratch, with and without thoughts, and compare (resumes after an interruption)
	.venv/bin/rlmt study --config study/mini --config study/quickstart

test: setup ## run the fast tests on 2 cores (WORKERS=... for more processes)
	$(PYTEST) -m "not slow"

test-all: setup ## run all tests, the exhaustive ones included
	$(PYTEST)

coverage: setup ## run the fast tests and list the lines that they do not execute
	$(PYTEST) -m "not slow" --cov=rlmt --cov-report=term-missing:skip-covered

check: setup docs ## lint, formatting, types and documentation
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: setup ## build the documentation into build/site, without network access; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet

format: setup ## rewrite the code in the one format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove .venv and every cache (runs/ stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/rlmt.egg-info
