"""Runs ``sglang.launch_server`` on a Ray cluster with this package in every Ray worker.

SGLang loads plugins in the processes it starts itself, but its Ray actors are started by Ray: the
hook registers there. Arguments are SGLang's. Called by ``serve.sh``.
"""

from __future__ import annotations

import os
import runpy
import sys

import ray

import sglang_w4afp8

if __name__ == "__main__":
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto"),
        runtime_env={
            "worker_process_setup_hook": sglang_w4afp8.register,
            "env_vars": {"SGLANG_W4AFP8_STRICT": "1"},
        },
    )
    # As "python -m sglang.launch_server" would see them.
    sys.argv = ["sglang.launch_server", *sys.argv[1:], "--use-ray"]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
