#!/usr/bin/env bash
# The decode half of a disaggregated pair: takes KV caches from prefill.sh, generates.
#
# Needs:   what pd/prefill.sh needs, on another machine that reaches the first over RDMA.
# Prints:  as one-node-8gpu.sh. It answers only through the router.
# Hangs:   see pd/prefill.sh; --disaggregation-ib-device must be a device in the same fabric.
#
# Usage:   pd/decode.sh MODEL IB_DEVICE [option of sglang-w4afp8 launch ...]
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: pd/decode.sh MODEL IB_DEVICE [--dry-run]}
device=${2:?a device of /sys/class/infiniband, or several with commas}

exec sglang-w4afp8 launch "$model" --tp 8 --run "${@:3}" -- \
    --disaggregation-mode decode \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-ib-device "$device" \
    --cuda-graph-max-bs-decode 128
