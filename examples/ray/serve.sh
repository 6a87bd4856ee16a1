#!/usr/bin/env bash
# One server over four machines with 8 GPUs each (TP 32), its ranks as Ray actors.
#
# Needs:   pip install "sglang[ray]" on every node; ray start --head on the first, ray start
#          --address=FIRST:6379 on the others; this script on the first node only.
# Prints:  "Ray cluster (auto PG): 4 nodes, 8 GPUs/node", then as four-nodes-8gpu-tp32.sh.
# Hangs:   waiting for a placement group: ray status shows which GPUs are missing. InvalidAuthToken:
#          RAY_AUTH_MODE and the token must be those of ray start. The launch command does not
#          watch these nodes; Ray does.
#
# Usage:   ray/serve.sh MODEL [argument of sglang.launch_server ...]
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: ray/serve.sh MODEL}

exec python3 "$(dirname "$0")/serve.py" \
    --model-path "$model" --quantization w4afp8 --tp-size 32 --nnodes 4 \
    --host 0.0.0.0 --port 30000 --cuda-graph-max-bs-decode 128 "${@:2}"
