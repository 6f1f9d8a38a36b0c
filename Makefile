# Every target works in a fresh checkout: targets that need .venv create it first with scripts/setup.sh, which takes a
# second once .venv exists.

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## create or update .venv (options: PYTHON=... and RLMT_DEVICE=cpu|cuda)
	@scripts/setup.sh

quickstart: setup ## train in the miniature world from scratch with and without thoughts, and compare (resumes if interrupted)
	.venv/bin/rlmt study --config study/mini --config study/quickstart

test: setup ## run the whole test suite
	.venv/bin/pytest

check: setup ## check lint, formatting and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: setup ## fix lint and format the code
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove .venv and all caches (keeps runs/)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist rlmt.egg-info
