"""AWQ layout (AutoAWQ), 4 bits: read only to be requantised.

``qweight`` int32 ``(K, N/8)`` packed along N in the order 0 2 4 6 1 3 5 7, ``qzeros`` int32
``(K/g, N/8)`` packed alike, ``scales`` float16 ``(K/g, N)``; w = (q − zero) · scale.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Read
from sglang_w4afp8.errors import CheckpointError

# Nibble i of a word holds output column _ORDER[i] of its eight.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words.unsqueeze(-1) >> shifts) & 0xF  # (R, C, 8) in stored order
    values = torch.empty_like(nibbles)
    values[..., list(_ORDER)] = nibbles
    return values.flatten(1).to(torch.float32)


class Awq:
    """See the module docstring."""

    name = "awq"

    def matches(self, parts: ExpertParts) -> bool:
        weight = parts.parts.get("qweight")
        return (
            weight is not None
            and weight.dtype == "I32"
            and parts.quant.get("quant_method") == "awq"
        )

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight, scales = parts.entry("qweight"), parts.entry("scales")
        columns, rows = weight.shape[0], weight.shape[1] * 8
        if scales.shape[1] != rows or columns % scales.shape[0]:
            raise CheckpointError(
                f"{parts.prefix}: qweight {list(weight.shape)}, scales {list(scales.shape)}",
                "AWQ has qweight (K, N/8) and scales (K/g, N)",
                ["download the shard again"],
            )
        return rows, columns

    def group_size(self, parts: ExpertParts) -> int | None:
        return None

    def inexact(self, parts: ExpertParts) -> str | None:
        return "AWQ weights are asymmetric: q − zero point spans −15…15, more than four bits"

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight:
        _, columns = self.shape(parts)
        scales = read(parts.entry("scales")).to(torch.float32)  # (K/g, N)
        index = torch.arange(columns) // (columns // scales.shape[0])
        codes = _unpack(read(parts.entry("qweight")))  # (K, N)
        if "qzeros" in parts.parts:
            codes -= _unpack(read(parts.entry("qzeros")))[index]
        else:
            codes -= 8.0
        return FloatWeight((codes * scales[index]).t().contiguous())
