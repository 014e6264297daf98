#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in pieces of under ten minutes each.
#
#   bash benchmarks/gpu.sh check            # first: tests marked gpu, every contender for a few steps at 125M
#   bash benchmarks/gpu.sh core-13b         # one of the pieces below; results in $OUT
#   OUT=/tmp/results DTYPE=bfloat16 bash benchmarks/gpu.sh core-1.3b
#
# Each piece writes PIECE.json and PIECE.txt to $OUT (benchmarks/results/gpu). A machine with network: `make install`
# before. One without: VLLM_KIT names a directory whose bootstrap.sh, sourced here, puts vLLM on the path; this package
# is then installed from its source, without an index, where the run can see its entry points.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PIECES="check core-1.3b core-2.7b core-6.7b core-13b batches-1.3b batches-13b mezo anatomy-1.3b anatomy-13b memory
serving long-1.3b long-13b"
OUT=${OUT:-benchmarks/results/gpu}
DTYPE=${DTYPE:-float16} # what the OPT checkpoints are in
LIMIT_S=${LIMIT_S:-585}

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "pieces:" $PIECES
    exit 2
}

find_python() {
    PYTHON=python3
    if [[ -n ${VLLM_KIT:-} ]]; then
        set +u # the kit's script is not written for it
        GPU_SKIP_PROBE=1 . "$VLLM_KIT/bootstrap.sh"
        set -u
        local site=${TMPDIR:-/tmp}/vllm-zo-site
        python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$site" .
        export PYTHONPATH=$site:${PYTHONPATH:-}
    elif [[ -x .venv/bin/python ]]; then
        PYTHON=.venv/bin/python
    fi
}

record() { # record NAME PROGRAM ARGUMENTS...: what it prints goes to the screen and to NAME.txt
    local name=$1
    shift
    timeout "$LIMIT_S" "$PYTHON" "$@" 2>"$OUT/$name.log" | tee "$OUT/$name.txt" || {
        tail -n 40 "$OUT/$name.log" >&2
        echo "$name failed; the whole log: $OUT/$name.log" >&2
        return 1
    }
}

core() { # core NAME SHAPE ARGUMENTS...
    local name=$1 shape=$2
    shift 2
    record "$name" benchmarks/core_step.py --device cuda --shape "$shape" --dtype "$DTYPE" --json "$OUT/$name.json" "$@"
}

check() {
    # Named one by one: the other files need packages that a machine without network may lack.
    record check-tests -m pytest -o addopts= -p no:cacheprovider -rA -m gpu $(grep -l 'mark\.gpu' tests/test_*.py)
    core check-core 125m --rounds 1 --interval 10 --slow-steps 4 \
        --against official-full,official,dense-mezo,strong,packed,compiled,gemms
}

batches() { # against the compiled step only: the released rule takes seconds a step there
    local batch
    for batch in 32 64 128; do
        core "batches-$1-b$batch" "$1" --batch "$batch" --rounds 1 --interval 20 --against official,compiled,gemms
    done
}

mkdir -p "$OUT"
case ${1:-} in
    check) find_python && check ;;
    core-1.3b | core-2.7b) find_python && core "$1" "${1#core-}" --rounds 3 --against official-full,official,strong,compiled,gemms ;;
    core-6.7b | core-13b) find_python && core "$1" "${1#core-}" --rounds 2 ;;
    batches-1.3b | batches-13b) find_python && LIMIT_S=190 batches "${1#batches-}" ;;
    mezo) find_python && core mezo 1.3b --method factorized-mezo --space fold --rank 128 --rounds 2 --against dense-mezo ;;
    anatomy-1.3b | anatomy-13b)
        find_python
        record "$1" benchmarks/step_anatomy.py --device cuda --shape "${1#anatomy-}" --dtype "$DTYPE" --json "$OUT/$1.json"
        ;;
    memory)
        find_python
        record memory benchmarks/memory.py --device cuda --shape 1.3b --dtype "$DTYPE" --rounds 1 --json "$OUT/memory.json"
        ;;
    serving)
        find_python
        record serving benchmarks/serving.py --device cuda --shape 13b --dtype "$DTYPE" --budgets 256,1024,0 --rate 20 \
            --rounds 2 --seconds 6 --json "$OUT/serving.json"
        ;;
    long-1.3b) find_python && record "$1" benchmarks/long_run.py --device cuda --shape 1.3b --dtype "$DTYPE" --json "$OUT/$1.json" ;;
    long-13b)
        find_python
        record "$1" benchmarks/long_run.py --device cuda --shape 13b --dtype "$DTYPE" --steps 350 --eval-interval 150 \
            --json "$OUT/$1.json"
        ;;
    *) usage ;;
esac
