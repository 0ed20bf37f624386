# Makes or reuses the virtual environment .venv and installs the project into it. Sourced by speedrun.sh and runtests.sh.
#
#   TORCH="torch==2.13.0"  which PyTorch to install first; the default asks for a CPU build where there is no NVIDIA GPU
#   VENV=path              where the environment lives (default .venv); an activated one is used as it is
#
# PyTorch goes first: installed as somebody's dependency, it would come as a CUDA build of several gigabytes.

if [ -z "${VIRTUAL_ENV:-}" ]; then
    VENV="${VENV:-.venv}"
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
stamp="$VIRTUAL_ENV/.nanochat-installed"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || ! grep -qx "$PWD" "$stamp"; then
    echo "installing into $VIRTUAL_ENV (a few minutes the first time)"
    pip="python -m pip install --quiet --disable-pip-version-check"
    if ! python -c "import torch" 2>/dev/null; then
        $pip "${TORCH:-torch==2.13.0}"
    fi
    extras=dev
    if command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null; then
        # the CUDA kernels compile against the torch just installed; without them Mamba layers use the PyTorch scan
        $pip --no-build-isolation -e ".[gpu]" || echo "mamba-ssm or causal-conv1d did not install; going on without"
    fi
    $pip -e ".[$extras]"
    echo "$PWD" >"$stamp"
fi
