#!/usr/bin/env bash
# The load of the published 32 × L40S numbers: 256 random prompts, 200 tokens in, 200 out, 128 at a
# time, against a server that runs.
#
# Needs:   a server; SGLang here; with DATASET=random a ShareGPT file, which SGLang downloads.
#          DATASET=random-ids makes prompts from random token ids and needs no download.
# Prints:  "Serving Benchmark Result" with output token throughput, TTFT and ITL; the same as a line
#          of JSON in OUTPUT.
# Hangs:   curl URL/health must answer; a first request may compile kernels for a minute.
#
# Usage:   bench-serving.sh MODEL [URL] [argument of sglang.bench_serving ...]
# RANGE_RATIO=1 makes every prompt exactly INPUT long; SGLang's default 0 draws lengths from 1 on.
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: bench-serving.sh MODEL [URL]}
url=${2:-http://127.0.0.1:30000}

exec python3 -m sglang.bench_serving --backend sglang --base-url "$url" --model "$model" \
    --dataset-name "${DATASET:-random}" --num-prompts "${PROMPTS:-256}" \
    --random-input-len "${INPUT:-200}" --random-output-len "${OUTPUT_LEN:-200}" \
    --random-range-ratio "${RANGE_RATIO:-1}" --max-concurrency "${CONCURRENCY:-128}" \
    --output-file "${OUTPUT:-bench-serving.jsonl}" "${@:3}"
