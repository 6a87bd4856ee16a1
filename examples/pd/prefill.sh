#!/usr/bin/env bash
# The prefill half of a disaggregated pair: computes prompts, hands their KV cache to decode.sh.
#
# Needs:   8 GPUs, an RDMA device, a transfer library for the KV cache (pip install
#          mooncake-transfer-engine); decode.sh on other machines and router.sh in front of both.
# Prints:  as one-node-8gpu.sh. It answers only through the router.
# Hangs:   on the first request: the decode side cannot reach port 8998 here, or the two sides run
#          different --tp or versions (sglang-w4afp8 doctor --cluster hosts.txt).
#
# Usage:   pd/prefill.sh MODEL IB_DEVICE [option of sglang-w4afp8 launch ...]     e.g. mlx5_0
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: pd/prefill.sh MODEL IB_DEVICE [--dry-run]}
device=${2:?a device of /sys/class/infiniband, or several with commas}

exec sglang-w4afp8 launch "$model" --tp 8 --run "${@:3}" -- \
    --disaggregation-mode prefill \
    --disaggregation-transfer-backend mooncake \
    --disaggregation-ib-device "$device" \
    --disaggregation-bootstrap-port 8998
