#!/usr/bin/env bash
# Puts the SGLang wheels that the contract and patch tests read into .whl/, without what they
# depend on. A wheel that patches/*/BASE names must have the hash that is noted there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/find_python.sh)
mapfile -t versions < <(
    {
        for file in requirements/sglang-*.txt; do
            file=${file##*/sglang-}
            echo "${file%.txt}"
        done
        awk '{ print $2 }' patches/*/BASE
    } | sort -u
)
for version in "${versions[@]}"; do
    if ! compgen -G ".whl/sglang-$version-*.whl" >/dev/null; then
        echo "== .whl: SGLang $version"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --dest .whl "sglang==$version"
    fi
done
while read -r _ _ wheel digest; do
    if [[ -f .whl/$wheel ]]; then
        echo "${digest#sha256:}  .whl/$wheel" | sha256sum --check --quiet
    fi
done < <(cat patches/*/BASE)
