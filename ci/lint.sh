#!/usr/bin/env bash
# ruff's rules, ruff's format, mypy and the import contracts, each of them even where another finds something. Settings:
# pyproject.toml.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
.venv/bin/python -m ruff check . || status=1
.venv/bin/python -m ruff format --check . || status=1
.venv/bin/python -m mypy || status=1
PYTHONPATH=$PWD .venv/bin/lint-imports --no-cache --no-logo || status=1 # PYTHONPATH: this checkout, and ci/contracts.py
exit "$status"
