#!/usr/bin/env bash
# Builds the wheel from a bare copy of the sources and uses it outside the checkout: no file is missing, the entry
# points load, and nothing is imported from the working tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$PWD/.venv/bin/python"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

mkdir "$scratch/source"
cp -r pyproject.toml README.md LICENSE vllm_zo "$scratch/source"
find "$scratch/source" -name __pycache__ -prune -exec rm -rf {} +
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" "$scratch/source"
"$python" -m pip install --quiet --no-deps --no-index --target "$scratch/site" "$scratch"/*.whl

# Every source file, and nothing else, reached the wheel. (build/ lies beside vllm_zo/, so it is not in the comparison.)
if ! diff --recursive --brief --exclude __pycache__ "$scratch/source/vllm_zo" "$scratch/site/vllm_zo"; then
    echo "wheel: files differ from the checkout; a package without __init__.py is left out of a wheel" >&2
    exit 1
fi

cp ci/check_wheel.py "$scratch"
cd "$scratch"
PYTHONPATH="$scratch/site" "$python" check_wheel.py "$scratch/site"
