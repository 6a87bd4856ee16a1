"""W4AFP8 itself as a source: groups can be cut smaller, and FP32 scales become BF16.

The published checkpoints differ in the dtype of ``weight_scale_inv`` (FP32 in the first ones, BF16
in the newer); SGLang rounds to BF16 when it loads, so nothing is lost that would be used.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, Int4Weight, Read
from sglang_w4afp8.errors import CheckpointError


class W4AFp8:
    """See the module docstring."""

    name = "w4afp8"

    def matches(self, parts: ExpertParts) -> bool:
        weight = parts.parts.get("weight")
        scale = parts.parts.get("weight_scale_inv")
        return (
            weight is not None
            and weight.dtype == "I8"
            and scale is not None
            and scale.dtype in ("BF16", "F32", "F16")
        )

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight, scale = parts.entry("weight"), parts.entry("weight_scale_inv")
        rows, columns = weight.shape[0], weight.shape[1] * 2
        if len(scale.shape) != 2 or scale.shape[0] != rows or columns % scale.shape[1]:
            raise CheckpointError(
                f"{parts.prefix}: weight {list(weight.shape)}, scales {list(scale.shape)}",
                "every row needs the same number of whole groups",
                ["download the shard again"],
            )
        return rows, columns

    def group_size(self, parts: ExpertParts) -> int | None:
        return self.shape(parts)[1] // parts.entry("weight_scale_inv").shape[1]

    def inexact(self, parts: ExpertParts) -> str | None:
        return None

    def load(self, parts: ExpertParts, read: Read) -> Int4Weight:
        group = self.group_size(parts)
        assert group is not None
        scale = read(parts.entry("weight_scale_inv")).to(torch.bfloat16)
        return Int4Weight(read(parts.entry("weight")), scale, group)
