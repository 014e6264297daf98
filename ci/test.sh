#!/usr/bin/env bash
# The tests. Arguments go to pytest: bash ci/test.sh tests/test_noise.py -x
#
# The whole suite runs in two processes where there are two cores; WORKERS=1 runs it in one. Most of its time goes into
# starting engines and servers, which uses one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A path among the arguments replaces the whole suite.
paths=(tests)
for argument in "$@"; do [[ -e ${argument%%::*} ]] && paths=(); done
workers=${WORKERS:-$(($(nproc) > 1 ? 2 : 1))}
parallel=()
if ((${#paths[@]} && workers > 1)); then parallel=(--numprocesses "$workers" --dist loadfile); fi
exec .venv/bin/python -m pytest -q --durations 10 --durations-min 5 "${parallel[@]}" "${paths[@]}" "$@"
