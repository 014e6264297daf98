#!/usr/bin/env bash
# Makes .venv with vLLM, this package (editable) and the test tools. Returns at once when .venv is up to date.
#
#   PYTHON=python3.12 bash ci/install.sh      another interpreter
#   VARIANT=cpu bash ci/install.sh            the CPU build on a machine with a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV_PYTHON=.venv/bin/python
STAMP=.venv/.installed
LOG=.venv/install.log
# Where PyTorch publishes its CPU wheels (torch==2.13.0+cpu); PyPI itself carries only the CUDA ones.
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "install: $*"; }
die() {
    say "$*" >&2
    exit 1
}

variant() { # cuda where a driver answers and lists a GPU
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; else echo cpu; fi
}

fingerprint() { # what .venv depends on: the package (not the tools' settings), and the path an editable install keeps
    { sed '/^\[tool\./,$d' pyproject.toml && cat ci/install.sh ci/check_install.py && echo "$VARIANT $PWD"; } | cksum
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    candidate=${PYTHON:-python3}
    die "needs Python 3.11, 3.12 or 3.13; $candidate is $("$candidate" --version 2>/dev/null || echo "not there")." \
        "Install one and name it: make install PYTHON=/path/to/python3.12"
}

require_compiler() { # Triton (GPU) and torch.compile build small C and C++ files at run time
    local compiler
    for compiler in "${CC:-cc}" gcc clang; do
        if command -v "$compiler" >/dev/null; then return; fi
    done
    die "needs a C compiler (cc, gcc or clang), because vLLM compiles kernels at run time." \
        "Debian and Ubuntu: apt install build-essential"
}

make_venv() {
    if supported "$VENV_PYTHON" && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then return; fi
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
        die "'$python -m venv' failed. Debian and Ubuntu keep it in a package of its own: apt install python3-venv"
}

pip_install() { # the screen gets the few lines that show where it is, the log gets everything
    "$VENV_PYTHON" -m pip install --progress-bar off --editable ".[$VARIANT,dev]" "$@" 2>&1 | tee "$LOG" |
        { grep --line-buffered -oE '^(Collecting (vllm|torch)\S*|Installing collected packages)' || true; }
}

install_packages() {
    say "installing the $VARIANT variant, some minutes (log: $LOG)"
    if pip_install; then return; fi
    if grep -q 'torch==[0-9.]*+cpu' "$LOG"; then
        say "no configured package index has PyTorch's CPU build; adding $TORCH_CPU_INDEX"
        if pip_install --extra-index-url "$TORCH_CPU_INDEX"; then return; fi
    fi
    grep -E '^ *(ERROR|error|WARNING)' "$LOG" | cut -c -300 | sort -u | tail -n 10 >&2 || true
    die "pip failed; the whole log is in $LOG"
}

VARIANT=${VARIANT:-$(variant)}
if [[ -x $VENV_PYTHON && -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]]; then exit 0; fi
require_compiler
make_venv
install_packages
"$VENV_PYTHON" ci/check_install.py
fingerprint >"$STAMP"
say "done in $SECONDS s"
