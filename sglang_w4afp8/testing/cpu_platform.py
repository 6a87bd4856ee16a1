"""Entry point of the CPU platform (group ``sglang.srt.platforms``, name ``w4afp8_cpu``).

SGLang imports this module in every process of every installation that has the package, so it
imports nothing to speak of, and answers None unless ``SGLANG_PLATFORM`` names the platform. The
platform itself is ``sglang_w4afp8.srt.cpu_platform``.
"""

from __future__ import annotations

import os

NAME = "w4afp8_cpu"
CLASS = "sglang_w4afp8.srt.cpu_platform:CpuPlatform"
PRELOADED = ["sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager"]
"""What takes the time when a rank starts."""


def activate() -> str | None:
    """Return the platform class for SGLang to load, or None when it was not asked for.

    GPUs are hidden from this process and its children: SGLang decides most code paths by
    ``torch.cuda.is_available()``, not by the platform.
    """
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sglang_w4afp8.env import SHARE_IMPORTS

    if SHARE_IMPORTS.is_on():
        _share_imports()
    return CLASS


def _share_imports() -> None:
    """Let ranks be forked from one process that has imported SGLang, where SGLang would spawn them.

    Importing takes a rank about eight seconds of a core. Everything after it, loading plugins
    included, still happens in each rank.
    """
    import multiprocessing

    choose = multiprocessing.set_start_method

    def set_start_method(method: str | None, force: bool = False) -> None:
        if method == "spawn":
            multiprocessing.set_forkserver_preload(PRELOADED)
            method = "forkserver"
        choose(method, force=force)

    multiprocessing.set_start_method = set_start_method
