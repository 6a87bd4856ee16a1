"""AngelSlim's ``w4a8_fp8`` exports (Tencent): W4AFP8 under other names.

``qweight`` int8 ``(N, K/2)`` with W4AFP8's nibble order, ``weight_scale.int4`` bfloat16
``(N, K/128)``, a per-tensor ``weight_scale`` of the intermediate FP8 rounding that nothing needs
any more, and ``input_scale``. The MTP layer of such a checkpoint is left in FP8; it is converted
like any FP8 layer.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, Int4Weight, Read
from sglang_w4afp8.errors import CheckpointError

_SCALE = "weight_scale.int4"


class AngelSlim:
    """See the module docstring."""

    name = "angelslim"

    def matches(self, parts: ExpertParts) -> bool:
        weight = parts.parts.get("qweight")
        return weight is not None and weight.dtype in ("I8", "U8") and _SCALE in parts.parts

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight, scale = parts.entry("qweight"), parts.entry(_SCALE)
        rows, columns = weight.shape[0], weight.shape[1] * 2
        if scale.shape[0] != rows or columns % scale.shape[1]:
            raise CheckpointError(
                f"{parts.prefix}: qweight {list(weight.shape)}, {_SCALE} {list(scale.shape)}",
                "every row needs the same number of whole groups",
                ["download the shard again"],
            )
        return rows, columns

    def group_size(self, parts: ExpertParts) -> int | None:
        return self.shape(parts)[1] // parts.entry(_SCALE).shape[1]

    def inexact(self, parts: ExpertParts) -> str | None:
        return None

    def load(self, parts: ExpertParts, read: Read) -> Int4Weight:
        group = self.group_size(parts)
        assert group is not None
        return Int4Weight(
            read(parts.entry("qweight")).view(torch.int8),
            read(parts.entry(_SCALE)).to(torch.bfloat16),
            group,
        )
