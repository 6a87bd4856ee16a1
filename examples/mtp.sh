#!/usr/bin/env bash
# One machine with 8 GPUs and speculative decoding: DeepSeek's own next-token layer (MTP) drafts,
# the model verifies. Faster for few concurrent requests, not for full batches.
#
# Needs:   a checkpoint that kept its MTP layer (sglang-w4afp8 convert does; inspect shows layer 61
#          of DeepSeek-R1), and memory for it beside the KV cache.
# Prints:  as one-node-8gpu.sh; then, while decoding, "accept len" above 1 in the "Decode batch" lines.
# Hangs:   as one-node-8gpu.sh. An accept length of 1.0 means that no draft is ever right: the MTP
#          layer was not loaded as it should.
#
# Usage:   mtp.sh MODEL [option of sglang-w4afp8 launch ...]     --dry-run only prints
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
model=${1:?usage: mtp.sh MODEL [--dry-run]}

# Three steps of one candidate each make four tokens to verify. NEXTN takes the draft layer from the
# checkpoint itself, so there is no --speculative-draft-model-path.
exec sglang-w4afp8 launch "$model" --tp 8 --run "${@:2}" -- \
    --speculative-algorithm NEXTN \
    --speculative-num-steps 3 \
    --speculative-eagle-topk 1 \
    --speculative-num-draft-tokens 4
