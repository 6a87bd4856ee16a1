#!/usr/bin/env bash
# The router in front of a disaggregated pair; clients talk to its port 8000.
#
# Needs:   pip install sglang-router; pd/prefill.sh and pd/decode.sh running.
# Prints:  that both workers are healthy and added, then one line a request.
# Hangs:   waiting for workers: curl http://PREFILL:30000/health from this machine.
#
# Usage:   pd/router.sh PREFILL_IP DECODE_IP
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
prefill=${1:?usage: pd/router.sh PREFILL_IP DECODE_IP}
decode=${2:?the address of the decode server}

# 8998 is the port at which the decode side asks the prefill side where the KV cache is.
exec python3 -m sglang_router.launch_router --pd-disaggregation \
    --prefill "http://$prefill:30000" 8998 \
    --decode "http://$decode:30000" \
    --host 0.0.0.0 --port 8000
