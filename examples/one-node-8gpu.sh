#!/usr/bin/env bash
# One server on one machine with 8 GPUs: DeepSeek-R1 in W4AFP8 is 367 GB, so 8 × 80 GB hold it.
#
# Needs:   the checkpoint; SGLang and sglang-w4afp8 in this environment (sglang-w4afp8 doctor MODEL).
# Prints:  "registered quantization 'w4afp8'", a line with "MoE layers, tp=8", and at the end
#          "The server is fired up and ready to roll!".
# Hangs:   while loading: watch the page cache grow (free -g), a network disk needs many minutes;
#          after "Init torch distributed": sglang-w4afp8 doctor (/dev/shm, NCCL_ variables).
#
# Usage:   one-node-8gpu.sh MODEL [option of sglang-w4afp8 launch ...]     --dry-run only prints
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: one-node-8gpu.sh MODEL [--dry-run]}

exec sglang-w4afp8 launch "$model" --tp 8 --run "${@:2}"
