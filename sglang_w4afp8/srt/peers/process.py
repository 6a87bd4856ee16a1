"""What SGLang's layers expect of the process they run in: one rank of one, default arguments."""

from __future__ import annotations

import atexit
import os
import tempfile
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch

# Read when SGLang is first imported. Compiling DeepGEMM ahead for every number of tokens up to
# 16384 takes a quarter of an hour.
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")


@lru_cache(maxsize=1)
def enter_single_rank() -> None:
    """Make this process a server's only rank, for the rest of its life.

    SGLang's runners ask for the tensor-parallel group and for the server's arguments even where one
    rank needs neither.
    """
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args().install()
    meeting_point = Path(tempfile.mkdtemp(prefix="sglang-w4afp8-bench-")) / "store"
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"file://{meeting_point}",
        backend="nccl" if torch.cuda.is_available() else "gloo",
    )
    initialize_model_parallel()
    atexit.register(torch.distributed.destroy_process_group)


def missing(module: str) -> str | None:
    """Why ``module`` cannot be imported, as half a sentence, or None."""
    try:
        # SGLang's modules import each other in circles; from here all of them resolve.
        import_module("sglang.srt.layers.quantization")
        import_module(module)
    except Exception as error:  # a broken kernel library raises anything at import
        return f"{module} cannot be imported: {type(error).__name__}: {str(error)[:160]}"
    return None
