# Makes or reuses a Python environment and installs the project into it. Sourced by speedrun.sh and runtests.sh.
#
#   An activated environment is used as it is, a venv or a conda one (but not conda's "base"). Otherwise one is made:
#   VENV=path     where (default .venv)
#   PYTHON=name   of which Python, 3.10 or later (default python3)
#   TORCH="..."   what pip is given to install PyTorch, unless it is there already (default torch==2.13.0). Options may
#                 stand in it, too: TORCH="torch==2.13.0 --index-url ADDRESS"
#
# PyTorch goes first and pinned, so that the other packages take the one that is there instead of bringing theirs.
# Whether that name means a CPU or a CUDA build is up to the package index: README.md says how to choose.

env=${VIRTUAL_ENV:-}
[ -n "$env" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ] || env=${CONDA_PREFIX:-}
if [ -z "$env" ]; then
    env=${VENV:-.venv}
    # pip comes below: where ensurepip is missing (Debian has it in python3-venv), plain "venv" would stop halfway
    [ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv --without-pip "$env"
    env=$(cd "$env" >/dev/null && pwd)
    export VIRTUAL_ENV="$env"
fi
if [ ! -x "$env/bin/python" ]; then
    echo "error: the environment $env has no Python: activate another one, or none" >&2
    exit 2
fi
export PATH="$env/bin:$PATH"

stamp="$env/.nanochat-installed" # holds the path of the repository that was installed
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || ! grep -Fxq -- "$PWD" "$stamp"; then
    echo "installing into $env (a few minutes the first time)"
    if ! python -c "import sys; sys.exit(sys.version_info < (3, 10))"; then
        echo "error: $env has $(python --version 2>&1), but 3.10 or later is needed: remove it and set PYTHON" >&2
        exit 2
    fi
    if ! python -m pip --version >/dev/null 2>&1 && ! python -m ensurepip >/dev/null 2>&1 &&
        ! "${PYTHON:-python3}" -m pip --python "$env/bin/python" install --quiet pip; then
        echo "error: $env has no pip and none could be installed: install python3-pip or python3-venv" >&2
        exit 2
    fi
    pip="python -m pip install --quiet --disable-pip-version-check"
    # shellcheck disable=SC2086  # TORCH is a list of words
    python -c "import torch" 2>/dev/null || $pip ${TORCH:-torch==2.13.0}
    if command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null; then
        # the CUDA kernels compile against the torch just installed, so without isolation, so with what building needs
        if ! { $pip packaging wheel ninja "setuptools>=70" && $pip --no-build-isolation -e ".[gpu]"; }; then
            printf '%s\n' "" "!!! WARNING: mamba-ssm or causal-conv1d did not install (see above)." \
                "!!! Mamba layers will run on the PyTorch scan, which is far slower on a GPU. To try again:" \
                "!!!     $(command -v python) -m pip install --no-build-isolation -e '.[gpu]'" "" >&2
        fi
    fi
    $pip -e ".[dev]"
    echo "$PWD" >"$stamp"
fi
