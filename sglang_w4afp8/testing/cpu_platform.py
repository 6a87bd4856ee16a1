"""Entry point of the CPU platform (group ``sglang.srt.platforms``, name ``w4afp8_cpu``).

SGLang imports this module in every process of every installation that has the package, so it
imports nothing, and answers None unless ``SGLANG_PLATFORM`` names the platform. The platform
itself is ``sglang_w4afp8.srt.cpu_platform``.
"""

from __future__ import annotations

import os

NAME = "w4afp8_cpu"
CLASS = "sglang_w4afp8.srt.cpu_platform:CpuPlatform"


def activate() -> str | None:
    """Return the platform class for SGLang to load, or None when it was not asked for.

    GPUs are hidden from this process and its children: SGLang decides most code paths by
    ``torch.cuda.is_available()``, not by the platform.
    """
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return CLASS
