#!/usr/bin/env bash
# Puts the SGLang wheels that the contract tests read into .whl/, without what they depend on.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/find_python.sh)
for file in requirements/sglang-*.txt; do
    version=${file#requirements/sglang-}
    version=${version%.txt}
    if ! compgen -G ".whl/sglang-$version-*.whl" >/dev/null; then
        echo "== .whl: SGLang $version"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --dest .whl "sglang==$version"
    fi
done
