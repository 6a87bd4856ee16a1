#!/usr/bin/env bash
# Runs pytest in .venv-VERSION: scripts/test.sh VERSION [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/test.sh SGLANG_VERSION [PYTEST ARGUMENT ...]}
shift
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
# One thread per process: the servers' ranks share the cores and would spin against each other.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Settings of the caller's shell must not decide what is tested.
for name in $(compgen -e | grep -E '^_?SGLANG_' || true); do unset "$name"; done
echo "== tests with SGLang $version"
# Two processes: a single one leaves a core idle while a server's first process imports SGLang.
# A test that hangs shows where, long before CI's own limit.
exec ".venv-$version/bin/python" -m pytest -n "${JOBS:-2}" --durations=15 -o faulthandler_timeout=1200 "$@"
