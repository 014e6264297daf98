#!/usr/bin/env bash
# The tests. Arguments go to pytest: bash ci/test.sh tests/test_noise.py -x
#
# WORKERS=2 runs the whole suite in two processes. Most of its time goes into starting engines and servers, which uses
# one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A path among the arguments replaces the whole suite.
paths=(tests)
for argument in "$@"; do [[ -e ${argument%%::*} ]] && paths=(); done
parallel=()
if ((${#paths[@]} && ${WORKERS:-1} > 1)); then parallel=(--numprocesses "$WORKERS" --dist loadfile); fi
exec .venv/bin/python -m pytest -q --durations 10 --durations-min 5 "${parallel[@]}" "${paths[@]}" "$@"
