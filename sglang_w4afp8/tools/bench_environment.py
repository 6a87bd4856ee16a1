"""What a result of ``bench`` says about the machine and the software that made it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8 import __version__
from sglang_w4afp8.tools.versions import version_of

LIBRARIES = (
    "sglang", "sglang-kernel", "sgl-deep-gemm", "humming-kernels", "flashinfer-python", "triton",
)  # fmt: skip


def environment(commit: str | None) -> dict[str, Any]:
    """What a result needs to explain itself; ``commit`` None asks git."""
    driver = _lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "sglang_w4afp8": __version__,
        "commit": commit or _commit(),
    }


def command(words: Sequence[str]) -> str:
    """As it would be typed, without the folders of this machine; ``words`` behind the program's."""
    own = words[1:] if words[:1] == ["bench"] else words
    return "sglang-w4afp8 bench " + " ".join(Path(word).name for word in own)


def _commit() -> str:
    """Of the checkout that this file is in; "unknown" for an installed copy, wherever it lies."""
    root = Path(__file__).resolve().parents[2]
    found = _lines("git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD")
    return found[1] if len(found) == 2 and Path(found[0]).resolve() == root else "unknown"


def _lines(*command: str) -> list[str]:
    """What a program prints; nothing if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def gpu_word(device: str) -> str:
    """``h100`` of ``NVIDIA H100 80GB HBM3``: the first word with letters, then digits."""
    found = re.search(r"\b[A-Za-z]+\d+[A-Za-z]?\b", device)
    return (found[0] if found else device.replace(" ", "-")).lower()
