#!/usr/bin/env bash
# The same two requests with curl: one answered whole, one as a stream of server-sent events.
#
# Needs:   curl; a server.
# Prints:  a JSON object; then lines "data: {…}", the last one "data: [DONE]".
# Hangs:   curl URL/health must answer; a proxy may stand between (--noproxy '*' is set here).
#
# Usage:   clients/requests.sh [URL]
set -euo pipefail
export SGLANG_W4AFP8_STRICT=1
url=${1:-http://127.0.0.1:30000}

ask() {
    curl --silent --show-error --fail-with-body --noproxy '*' --no-buffer \
        --header 'Content-Type: application/json' --data "$1" "$url/v1/chat/completions"
    echo
}
question='"model": "default", "max_tokens": 64, "temperature": 0,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}]'
ask "{$question}"
ask "{$question, \"stream\": true}"
