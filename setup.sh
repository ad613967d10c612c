#!/bin/sh
# Make the environment: `sh setup.sh`, or `make demo` and `make test`, which call this first.
# Installs into the environment that is active (venv, conda, Kaggle); otherwise into .venv beside this file, which it
# makes. A second call is instant until setup.py or constraints.txt change. The folder of its programs: .env_bin.
set -eu
cd "$(dirname "$0")"
export PYTHONUTF8=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

fail() { echo "error: $1" >&2; exit 3; }

find_python() {
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

stamp_of() { cat setup.py constraints.txt setup.sh | cksum | tr ' ' -; }

python=$(find_python)
[ -n "$python" ] || fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python sh setup.sh"

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}${KAGGLE_KERNEL_RUN_TYPE:-}" ]; then
    python=$("$python" -c 'import sys; print(sys.executable)')
else
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo "making .venv with $("$python" --version)"
        rm -rf .venv
        if ! "$python" -m venv .venv >/dev/null 2>&1; then
            rm -rf .venv
            fail "this Python cannot make a virtual environment; run: apt install python3-venv (as root), then again"
        fi
    fi
    python="$PWD/.venv/bin/python"
fi
bin=$(dirname "$python")

if [ "$(cat .env_stamp 2>/dev/null)" != "$bin $(stamp_of)" ]; then
    # An installed torch stays (Kaggle's fits its GPUs); a fresh one is the tested version.
    if "$python" -c 'import torch' 2>/dev/null; then
        "$python" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >.env_constraints
        grep -iv '^torch==' constraints.txt >>.env_constraints
    else
        cp constraints.txt .env_constraints
        echo "installing torch (the longest step)"
        "$python" -m pip install -q -c constraints.txt torch
    fi
    echo "installing the rest"
    "$python" -m pip install -q -c .env_constraints setuptools wheel
    "$python" -m pip install -q -c .env_constraints --no-build-isolation -e '.[mpi,dev]'
    rm -f .env_constraints
    echo "$bin $(stamp_of)" >.env_stamp
fi
echo "$bin" >.env_bin
echo "ready: $bin"
