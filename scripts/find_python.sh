#!/usr/bin/env bash
# Prints a Python from 3.11 to 3.13, the versions that the tested SGLang releases have wheels for.
set -euo pipefail
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [[ -n $candidate ]] && "$candidate" - 2>/dev/null <<'EOF'
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
EOF
    then
        command -v "$candidate"
        exit 0
    fi
done
echo "no Python 3.11, 3.12 or 3.13 on this machine; set PYTHON=/path/to/one" >&2
exit 1
