#!/usr/bin/env bash
# Makes .venv-VERSION: the complete SGLang of that version, the tools of requirements/dev.txt and
# this package, editable. Needs Python 3.11 or newer and pip. Does nothing when it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/env.sh SGLANG_VERSION}
venv=.venv-$version
requirements=(
    -r "requirements/sglang-$version.txt"
    -r requirements/dev.txt
    -c "requirements/constraints-$version.txt"
)
# PYTHONPATH could smuggle another sglang in; without byte code every start takes twice as long.
unset PYTHONPATH PYTHONDONTWRITEBYTECODE

python=$(scripts/find_python.sh)
inputs=(requirements/*.txt pyproject.toml scripts/env.sh)
fingerprint=$(cat "${inputs[@]}" | sha256sum)
if [[ -f $venv/.ready && $(<"$venv/.ready") == "$fingerprint" ]]; then
    exit 0
fi

echo "== $venv: SGLang $version with $("$python" --version)"
# --target needs neither the venv module nor permission to change the system's Python.
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade \
    --target .venv-uv -r requirements/uv.txt
uv=.venv-uv/bin/uv
export UV_PYTHON_DOWNLOADS=never
"$uv" venv --quiet --clear --python "$python" "$venv"
"$uv" pip install --quiet --python "$venv/bin/python" "${requirements[@]}"
# --no-deps, as users of a serving environment install it: SGLang pins torch exactly.
"$uv" pip install --quiet --python "$venv/bin/python" --no-deps --editable .
echo "$fingerprint" >"$venv/.ready"
