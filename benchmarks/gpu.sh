#!/usr/bin/env bash
# Everything that we measure on a GPU, in pieces of less than ten minutes each.
#
#   bash benchmarks/gpu.sh quick            # four minutes: short forms of check, core-1.3b and core-13b
#   bash benchmarks/gpu.sh check            # first: tests marked gpu, every contender for a few steps at 125M
#   bash benchmarks/gpu.sh core-13b         # one of the pieces below; results in $OUT
#   OUT=/tmp/results DTYPE=bfloat16 bash benchmarks/gpu.sh core-1.3b
#
# Each piece writes PIECE.json and PIECE.txt to $OUT (benchmarks/results/gpu). With a network, run `make install` first.
# Without one, VLLM_KIT names a directory whose bootstrap.sh puts vLLM on the path. The script then installs this
# package from its source, without an index, so that vLLM finds its entry points.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PIECES="quick check core-1.3b core-2.7b core-6.7b core-13b b32-1.3b b64-1.3b b128-1.3b b32-13b b64-13b b128-13b
mezo mezo-512 anatomy-1.3b anatomy-13b memory serving long-1.3b long-13b"
OUT=${OUT:-benchmarks/results/gpu}
DTYPE=${DTYPE:-float16} # what the OPT checkpoints are in
LIMIT_S=${LIMIT_S:-585} # below the ten minutes of a piece, so that a piece that hangs still shows its log

usage() {
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "pieces: ${PIECES//$'\n'/ }"
    exit "$1"
}

find_python() {
    PYTHON=python3
    if [[ -n ${VLLM_KIT:-} ]]; then
        set +u # the kit's script is not written for it
        # shellcheck source=/dev/null
        GPU_SKIP_PROBE=1 . "$VLLM_KIT/bootstrap.sh"
        set -u
        local site=${TMPDIR:-/tmp}/vllm-zo-site
        python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$site" .
        export PYTHONPATH=$site:${PYTHONPATH:-}
    elif [[ -x .venv/bin/python ]]; then
        PYTHON=.venv/bin/python
    fi
}

record() { # record NAME PROGRAM ARGUMENTS...: its output goes to the screen and to NAME.txt
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
    program "$name" core_step.py "$shape" "$@"
}

tests() { # tests ARGUMENTS...: the files by name: the others need packages that a machine without network may lack
    local files
    mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
    record check-tests -m pytest -o addopts= -p no:cacheprovider -rA -m gpu "$@" "${files[@]}"
}

until_s() { # until_s SECOND: what is left until that second of this script
    echo $(($1 > SECONDS ? $1 - SECONDS : 1))
}

check() {
    local failed=0
    tests || failed=1
    core check-core 125m --rounds 1 --interval 10 --slow-steps 4 \
        --against official-full,official,dense-mezo,strong,packed,compiled,stock-files,stock-in-place,gemms || failed=1
    return $failed
}

program() { # program NAME FILE SHAPE ARGUMENTS...
    local name=$1 file=$2 shape=$3
    shift 3
    record "$name" "benchmarks/$file" --device cuda --shape "$shape" --dtype "$DTYPE" --json "$OUT/$name.json" "$@"
}

failed=0
piece=${1:-}
shape=${piece#*-}
if [[ $piece == -h || $piece == --help ]]; then usage 0; fi
[[ -n $piece && " ${PIECES//$'\n'/ } " == *" $piece "* ]] || usage 2
mkdir -p "$OUT"
find_python
case $piece in
    quick)
        # Each part has its share of the four minutes and what the parts before it left of theirs, and the next one
        # starts whatever became of it. The eager engine runs every kernel of ours; a graph is captured in the others.
        LIMIT_S=$(until_s 60) tests -k eager || failed=1
        LIMIT_S=$(until_s 130) core quick-1.3b 1.3b --rounds 1 --interval 20 --slow-steps 4 --against official,stock-in-place,gemms || failed=1
        LIMIT_S=$(until_s 240) core quick-13b 13b --rounds 1 --interval 20 --slow-steps 2 --against official,gemms || failed=1
        exit $failed
        ;;
    check) LIMIT_S=290 check ;;
    core-1.3b) core "$piece" "$shape" --rounds 3 --against official-full,official,strong,compiled,stock-files,stock-in-place,gemms ;;
    core-2.7b) core "$piece" "$shape" --rounds 2 --against official-full,official,strong,compiled,stock-files,stock-in-place,gemms ;;
    core-*) core "$piece" "$shape" --rounds 2 ;;
    b32-* | b64-* | b128-*)
        batch=${piece%%-*}
        core "$piece" "$shape" --batch "${batch#b}" --rounds 2 --interval 20 --against official,compiled,gemms
        ;;
    mezo) core mezo 1.3b --method factorized-mezo --space fold --rank 128 --rounds 2 --against dense-mezo ;;
    mezo-512) core mezo-512 1.3b --method factorized-mezo --space fold --rank 512 --rounds 2 --against dense-mezo ;;
    anatomy-*) program "$piece" step_anatomy.py "$shape" ;;
    memory) program memory memory.py 1.3b --rounds 1 ;;
    serving) program serving serving.py 13b --slowdowns 1.1,0 --together 256 --shares 25,75 --rounds 2 --seconds 6 ;;
    long-1.3b) program "$piece" long_run.py "$shape" ;;
    long-13b) program "$piece" long_run.py "$shape" --steps 350 --eval-interval 150 ;;
esac
