"""Source formats of routed experts: the protocol, and the choice among them.

One expert projection (``…experts.5.gate_proj``) is a handful of tensors, its *parts*. The set of
part names and their dtypes tells the format, projection by projection, so a checkpoint that mixes
formats (an MTP layer left in FP8 beside INT4 layers) needs no special case. Each format lives in a
file of its own and answers three questions: is this mine, what will come out, and give it to me.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.errors import CheckpointError

Read = Callable[[TensorEntry], torch.Tensor]


@dataclass
class FloatWeight:
    """A matrix to be rounded.

    Attributes:
        data: ``(N, K)`` float8_e4m3fn, bfloat16, float16 or float32.
        scale: float32 block scales ``(ceil(N/n), ceil(K/k))`` for FP8, else None.
        block: ``(n, k)`` when ``scale`` is given.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    block: tuple[int, int] | None = None


@dataclass
class Int4Weight:
    """A matrix that already is INT4, in the W4AFP8 layout.

    Attributes:
        packed: ``(N, K/2)`` int8.
        scale: ``(N, K/group_size)`` bfloat16.
        group_size: codes per scale along K.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    group_size: int


@dataclass(frozen=True)
class ExpertParts:
    """All tensors of one expert projection.

    Attributes:
        prefix: ``…experts.5.gate_proj``.
        parts: part name (``weight``, ``weight_scale_inv`` …) → entry.
        quant: the source's ``quantization_config``, empty when there is none.
    """

    prefix: str
    parts: Mapping[str, TensorEntry]
    quant: Mapping[str, Any]

    def entry(self, part: str) -> TensorEntry:
        """A part that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if part not in self.parts:
            raise CheckpointError(
                f"{self.prefix}.{part} is missing; present: {', '.join(sorted(self.parts))}",
                "the weight cannot be restored without it",
                ["download the shard that the index names for it", "rebuild the index"],
            )
        return self.parts[part]


class ExpertFormat(Protocol):
    """What a source-format module offers.

    ``name`` is what reports call the format.
    """

    name: str

    def matches(self, parts: ExpertParts) -> bool:
        """Whether these parts are in this format."""
        ...

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        """``(N, K)`` of the restored matrix.

        Raises:
            CheckpointError: parts are missing or their shapes contradict each other.
        """
        ...

    def group_size(self, parts: ExpertParts) -> int | None:
        """INT4 group of codes that can be taken over as they are; None when rounding is needed."""
        ...

    def inexact(self, parts: ExpertParts) -> str | None:
        """Why a 4-bit source cannot be taken over code by code; None when it can, or is not 4-bit.

        With a reason, :meth:`group_size` is None and :meth:`load` returns float weights.
        """
        ...

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight | Int4Weight:
        """Read the parts and hand over the matrix."""
        ...


def all_formats() -> tuple[ExpertFormat, ...]:
    """Every known format, the more specific ones first."""
    from sglang_w4afp8.checkpoint.angelslim import AngelSlim
    from sglang_w4afp8.checkpoint.awq import Awq
    from sglang_w4afp8.checkpoint.dense_float import DenseFloat
    from sglang_w4afp8.checkpoint.fp8_block import Fp8Block
    from sglang_w4afp8.checkpoint.gptq import Gptq
    from sglang_w4afp8.checkpoint.mxfp4 import MxFp4
    from sglang_w4afp8.checkpoint.pack_quantized import PackQuantized
    from sglang_w4afp8.checkpoint.w4afp8 import W4AFp8

    return (
        Fp8Block(),
        DenseFloat(),
        PackQuantized(),
        AngelSlim(),
        Awq(),
        Gptq(),
        MxFp4(),
        W4AFp8(),
    )


def detect(parts: ExpertParts) -> ExpertFormat:
    """The format of one expert projection.

    Raises:
        CheckpointError: no format fits; the message lists the parts and their dtypes.
    """
    for candidate in all_formats():
        if candidate.matches(parts):
            return candidate
    found = ", ".join(
        f"{part} {entry.dtype} {list(entry.shape)}" for part, entry in sorted(parts.parts.items())
    )
    raise CheckpointError(
        f"{parts.prefix}: {found}",
        "this is none of the source formats that convert knows",
        [
            "sglang-w4afp8 inspect SRC  shows the classes and dtypes",
            "convert from the original BF16 or FP8 checkpoint instead",
        ],
    )
