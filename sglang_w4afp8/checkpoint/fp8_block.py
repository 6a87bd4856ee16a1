"""FP8 experts: E4M3 weights with block, channel or tensor scales (DeepSeek, Qwen-FP8, Kimi-K2 …).

The scale may be called ``weight_scale_inv`` (DeepSeek and most others), ``scale`` (DeepSeek-V4) or
``weight_scale`` (compressed-tensors); it is multiplied in all of them. It may lie in another shard
than its weight: DeepSeek-V3's own checkpoint has such pairs.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Read
from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.errors import CheckpointError

SCALE_PARTS = ("weight_scale_inv", "scale", "weight_scale")
DEFAULT_BLOCK = (128, 128)


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales that an ``(N, K)`` matrix has under ``(n, k)`` blocks."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_of(
    name: str, weight: TensorEntry, scale: TensorEntry, declared: object
) -> tuple[int, int]:
    """The block that a scale tensor of this shape describes.

    Args:
        name: for messages.
        weight: ``(N, K)`` entry.
        scale: its scales: a block grid, ``(N, 1)`` or ``(N,)`` per channel, or a single value.
        declared: ``weight_block_size`` of the source's config, or None.

    Raises:
        CheckpointError: the scales fit no reading.
    """
    if len(weight.shape) != 2:
        raise CheckpointError(
            f"{name}: FP8 weight of shape {list(weight.shape)}",
            "blocks cut a matrix",
            ["sglang-w4afp8 inspect CHECKPOINT  shows what it holds", "download the shard again"],
        )
    rows, columns = weight.shape
    if scale.shape in ((), (1,), (1, 1)) and declared is None:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)) and declared is None:
        return 1, columns
    block = DEFAULT_BLOCK
    if isinstance(declared, (list, tuple)) and len(declared) == 2:
        block = (int(declared[0]), int(declared[1]))
    expected = block_grid(weight.shape, block)
    if scale.shape != expected:
        raise CheckpointError(
            f"{name}: weight {list(weight.shape)} with scales {list(scale.shape)}",
            f"blocks of {block[0]}x{block[1]} need scales of {list(expected)}",
            [
                'correct "weight_block_size" in the config.json of the source',
                "download the shards that hold the weight and its scales again",
            ],
        )
    return block


class Fp8Block:
    """See the module docstring."""

    name = "fp8"

    def matches(self, parts: ExpertParts) -> bool:
        weight = parts.parts.get("weight")
        return weight is not None and weight.dtype == "F8_E4M3"

    def _scale(self, parts: ExpertParts) -> TensorEntry:
        for part in SCALE_PARTS:
            if part in parts.parts:
                return parts.parts[part]
        return parts.entry(SCALE_PARTS[0])  # raises, naming the usual spelling

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight = parts.entry("weight")
        self._block(parts)
        return weight.shape[0], weight.shape[1]

    def _block(self, parts: ExpertParts) -> tuple[int, int]:
        return block_of(
            parts.prefix,
            parts.entry("weight"),
            self._scale(parts),
            parts.quant.get("weight_block_size"),
        )

    def group_size(self, parts: ExpertParts) -> int | None:
        return None

    def inexact(self, parts: ExpertParts) -> str | None:
        return None

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight:
        weight = parts.entry("weight")
        block = self._block(parts)
        scale = read(self._scale(parts)).to(torch.float32)
        grid = block_grid(weight.shape, block)
        return FloatWeight(read(weight), scale.reshape(grid), block)
