"""Checks that need the whole picture, made once per model before its first layer is built.

SGLang asserts divisibility deep inside a layer's constructor, with no numbers; by the time our
method sees the layer it is too late. At the first ``get_quant_method`` the model's config and the
parallel layout are known and nothing has been allocated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_w4afp8.checkpoint.index import read_header
from sglang_w4afp8.errors import ConfigError, ShardError
from sglang_w4afp8.sharding import ExpertShard, nearest_divisors
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.srt import host

_MOE_SIZE_KEYS = ("moe_intermediate_size", "expert_intermediate_size")


def check_model(spec: QuantSpec) -> None:
    """Raise if the server's model cannot be cut as its arguments ask.

    Outside a server, or for a model whose config.json is not a local file, there is nothing to
    check and the layers' own checks remain.

    Raises:
        ShardError: a size does not divide.
        ConfigError: config.json is damaged.
        CheckpointError: a weight file is truncated or damaged.
    """
    folder = host.argument("model_path")
    config = _read_config(folder)
    if folder is None or config is None:
        return
    if host.uses_weight_loaders():
        check_files(Path(folder))
    tp_size = int(host.argument("tp_size", 1))
    ep_size = int(host.argument("ep_size", 1))
    moe_dp_size = int(host.argument("moe_dp_size", 1))
    if tp_size % (ep_size * moe_dp_size):
        raise ShardError(
            f"--tp {tp_size} --ep-size {ep_size}",
            "the ranks of one expert-parallel group must divide the tensor-parallel ones",
            [f"--ep-size {d}" for d in nearest_divisors(tp_size, ep_size)],
        )
    moe_tp_size = tp_size // ep_size // moe_dp_size
    hidden_size = config.get("hidden_size")
    for key in _MOE_SIZE_KEYS:
        size = config.get(key)
        if isinstance(size, int) and isinstance(hidden_size, int):
            ExpertShard.plan(hidden_size, size, spec.group_size, 0, moe_tp_size, what=key)
    dense = config.get("intermediate_size")
    dense_tp = host.argument("moe_dense_tp_size", tp_size)
    if isinstance(dense, int) and dense % dense_tp:
        raise ShardError(
            f"intermediate_size {dense} over {dense_tp} tensor-parallel ranks",
            f"{dense} / {dense_tp} is not a whole number",
            [f"--tp {d}" for d in nearest_divisors(dense, dense_tp)]
            + ["--enable-dp-attention --moe-dense-tp-size 1 keeps dense MLPs whole"],
        )


def check_files(folder: Path) -> None:
    """Raise if a safetensors file is shorter than its own header says.

    The safetensors library stops at such a file too, minutes later and with "incomplete metadata".
    Only headers are read.

    Raises:
        CheckpointError: naming the file and both sizes.
    """
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)


def _read_config(model_path: str | None) -> dict[str, Any] | None:
    """config.json of a local checkpoint, its ``text_config`` where it has one."""
    path = Path(model_path or "") / "config.json"
    if not model_path or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON ({error})",
            "the model's sizes and its quantization are read from it",
            ["download the file again"],
        ) from None
    return config.get("text_config", config)
