"""MXFP4 experts (E2M1 nibbles, E8M0 scales over 32; DeepSeek-V4 style): read to be requantised.

``weight`` int8/uint8 ``(N, K/2)``, low nibble first, with ``scale``, ``weight_scale`` or
``weight_scale_inv`` ``(N, K/32)`` in E8M0. The values ±{0, .5, 1, 1.5, 2, 3, 4, 6} are no integer
grid, so INT4 cannot hold them exactly.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Read
from sglang_w4afp8.checkpoint.fp8_block import SCALE_PARTS
from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.errors import CheckpointError

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32


class MxFp4:
    """See the module docstring."""

    name = "mxfp4"

    def _scale(self, parts: ExpertParts) -> TensorEntry | None:
        return next((parts.parts[part] for part in SCALE_PARTS if part in parts.parts), None)

    def matches(self, parts: ExpertParts) -> bool:
        weight, scale = parts.parts.get("weight"), self._scale(parts)
        return (
            weight is not None
            and scale is not None
            and weight.dtype in ("I8", "U8")
            and scale.dtype in ("F8_E8M0", "U8")
        )

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight, scale = parts.entry("weight"), self._scale(parts)
        rows, columns = weight.shape[0], weight.shape[1] * 2
        if scale is None or scale.shape != (rows, columns // _GROUP):
            raise CheckpointError(
                f"{parts.prefix}: weight {list(weight.shape)}, "
                f"scales {list(scale.shape) if scale else 'missing'}",
                f"MXFP4 has one scale per {_GROUP} elements",
                ["download the shard again"],
            )
        return rows, columns

    def group_size(self, parts: ExpertParts) -> int | None:
        return None

    def inexact(self, parts: ExpertParts) -> str | None:
        return "MXFP4 values (0, 0.5, 1, 1.5, 2, 3, 4, 6) are no integer grid; rounding costs 3 dB"

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight:
        scale = self._scale(parts)
        assert scale is not None
        table = torch.tensor((*_VALUES, *(-value for value in _VALUES)))
        raw = read(parts.entry("weight")).view(torch.uint8)
        nibbles = torch.stack((raw & 0xF, raw >> 4), dim=-1).flatten(-2)
        exponents = read(scale).view(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)
        values = table[nibbles.to(torch.int32)] * exponents.repeat_interleave(_GROUP, dim=-1)
        return FloatWeight(values)
