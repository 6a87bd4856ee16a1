#!/usr/bin/env bash
# Rewrites requirements/constraints-VERSION.txt from a fresh resolution of that SGLang.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/freeze.sh SGLANG_VERSION}
python=$(scripts/find_python.sh)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m pip install --quiet --root-user-action=ignore --upgrade --target .venv-uv -r requirements/uv.txt
.venv-uv/bin/uv venv --quiet --python "$python" "$scratch/venv"
.venv-uv/bin/uv pip install --quiet --python "$scratch/venv/bin/python" "sglang==$version"
{
    echo "# What SGLang $version resolved to when this file was made, so that a release of somebody else does not"
    echo "# change what is tested. Made by: scripts/freeze.sh $version"
    .venv-uv/bin/uv pip freeze --python "$scratch/venv/bin/python" | grep -v '^sglang=='
} >"requirements/constraints-$version.txt"
