#!/usr/bin/env bash
# Set-up and the test suite:  bash runtests.sh [pytest arguments]
#
# Needs python3 with pip, and the network once, for the packages; setup.sh says which environment is used or made.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
# one thread a process: the tests' models are tiny, and two threads that wait for each other are slower than one
export OMP_NUM_THREADS=1
exec python -m pytest "$@"
