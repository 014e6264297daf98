#!/usr/bin/env bash
# ruff's rules, ruff's format and mypy, all three even where the first finds something. Settings: pyproject.toml.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
.venv/bin/python -m ruff check . || status=1
.venv/bin/python -m ruff format --check . || status=1
.venv/bin/python -m mypy || status=1
exit "$status"
