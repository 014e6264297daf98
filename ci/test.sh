#!/usr/bin/env bash
# The tests. Arguments go to pytest: bash ci/test.sh tests/test_noise.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A path among the arguments replaces the whole suite.
paths=(tests)
for argument in "$@"; do [[ -e ${argument%%::*} ]] && paths=(); done
exec .venv/bin/python -m pytest -q --durations 10 --durations-min 5 "${paths[@]}" "$@"
