"""Unquantised experts: one BF16, FP16 or FP32 matrix per projection."""

from __future__ import annotations

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Read
from sglang_w4afp8.errors import CheckpointError

_DTYPES = ("BF16", "F16", "F32")


class DenseFloat:
    """See the module docstring."""

    name = "bf16"

    def matches(self, parts: ExpertParts) -> bool:
        return set(parts.parts) == {"weight"} and parts.parts["weight"].dtype in _DTYPES

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        shape = parts.entry("weight").shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{parts.prefix}.weight has shape {list(shape)}",
                "an expert's projection is a matrix",
                [
                    "sglang-w4afp8 inspect CHECKPOINT  shows what it holds",
                    "download the shard again",
                ],
            )
        return shape[0], shape[1]

    def group_size(self, parts: ExpertParts) -> int | None:
        return None

    def inexact(self, parts: ExpertParts) -> str | None:
        return None

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight:
        return FloatWeight(read(parts.entry("weight")))
