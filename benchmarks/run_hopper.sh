#!/usr/bin/env bash
# Correctness first, then timings, each step with its own limit; a step that fails does not stop the
# next. Usage: benchmarks/run_hopper.sh OUTPUT_FOLDER [COMMIT]
out=${1:?output folder}; commit=${2:-unknown}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD" SGLANG_W4AFP8_CACHE_DIR="$PWD/build/cache"
step() {  # name, seconds, command...
  local name=$1 limit=$2; shift 2
  local begin=$SECONDS
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  echo "== $name: exit $? after $((SECONDS - begin)) s"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step tests 100 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_hopper_moe.py
grep -E "^E  |^FAILED|passed|failed" "$out/tests.txt" | cut -c1-150 | tail -n 30
for tp in 8 16 32; do
  step "bench-tp$tp" 60 python3 -m sglang_w4afp8.tools.bench moe --shape "r1-tp$tp" \
    --tokens 1 2 4 8 16 32 64 128 256 --routing uniform hot \
    --json "$out/moe-h100-r1-tp$tp.json" --commit "$commit"
  cat "$out/bench-tp$tp.txt"; rm "$out/bench-tp$tp.txt"
done
step parts 60 python3 benchmarks/hopper_parts.py --parts --json "$out/hopper-parts-h100.json" \
  --tokens 1 4 16 64 256 --path small medium large --commit "$commit"
cat "$out/parts.txt"
