#!/usr/bin/env bash
# One server over four machines with 8 GPUs each (TP 32), e.g. 4 × 8 L40S or L20: 64 columns a rank.
#
# Needs:   the same checkpoint path and the same versions on every node
#          (sglang-w4afp8 doctor MODEL --cluster hosts.txt), and ports 4999, 5000 and those NCCL
#          picks open between the nodes. RDMA pays. On Ada (L40S, L20) the experts run the torch
#          reference: right, not fast (sglang-w4afp8 doctor; README, Limits).
# Prints:  on each node "all nodes are here"; on node 0 a line with "MoE layers, tp=32" and at the
#          end "The server is fired up and ready to roll!". Requests go to node 0, port 30000.
# Hangs:   before "all nodes are here": every node says which one is missing, and why node 0 cannot
#          be reached. After it: NCCL_DEBUG=INFO and --iface with the interface between the nodes.
#
# Usage:   on every node: four-nodes-8gpu-tp32.sh MODEL MASTER_IP NODE_RANK [option of launch ...]
#          NODE_RANK is 0 on the machine that has MASTER_IP; --dry-run only prints.
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: four-nodes-8gpu-tp32.sh MODEL MASTER_IP NODE_RANK [--dry-run]}
master=${2:?the address of node 0}
rank=${3:?rank of this node, 0 to 3}

exec sglang-w4afp8 launch "$model" --tp 32 --nnodes 4 --master "$master" --node-rank "$rank" \
    --run "${@:4}" -- --cuda-graph-max-bs-decode 128
