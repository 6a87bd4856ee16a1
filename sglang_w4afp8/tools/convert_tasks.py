"""What happens to one expert projection: rounding, taking over, or unpacking to BF16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sglang_w4afp8.checkpoint.formats import (
    ExpertFormat,
    ExpertParts,
    FloatWeight,
    Int4Weight,
    all_formats,
)
from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.checkpoint.names import ExpertName
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.checkpoint.stream import OutTensor
from sglang_w4afp8.packing import has_minus_eight
from sglang_w4afp8.quantize.gptq import inverse_factor
from sglang_w4afp8.quantize.groups import resize_group_scale
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.quantize.weights import float_rows, quantize_weight
from sglang_w4afp8.reference import dequantize_int4
from sglang_w4afp8.tools.rewrite_job import Made


@dataclass(frozen=True)
class ConvertOptions:
    """What decides the bytes of the result (and nothing that does not).

    Attributes:
        method: ``rtn``, ``mse`` or ``gptq``.
        group_size: codes per scale; None takes the source's own (INT4 sources) or 128.
        activation: ``static`` or ``dynamic``.
        symmetric: codes −7…7 and positive scales only; ``rtn`` always does so.
        requantize: round 4-bit sources again instead of taking their codes over.
        keep: regular expressions; a MoE layer whose ``…experts`` path matches is not quantised.
        device_type: ``cpu`` or ``cuda``; their float arithmetic may differ in the last bit.
    """

    method: str = "mse"
    group_size: int | None = None
    activation: str = "dynamic"
    symmetric: bool = False
    requantize: bool = False
    keep: tuple[str, ...] = ()
    device_type: str = "cpu"


def _format(name: str) -> ExpertFormat:
    return next(item for item in all_formats() if item.name == name)


def _to_float(weight: FloatWeight | Int4Weight) -> FloatWeight:
    if isinstance(weight, FloatWeight):
        return weight
    return FloatWeight(
        dequantize_int4(weight.packed, weight.scale, weight.group_size, torch.float32)
    )


@dataclass(frozen=True)
class MomentsRef:
    """Where the second moments of a layer's inputs lie: directory and tensor."""

    root: Path
    entry: TensorEntry


@lru_cache(maxsize=2)
def _factor(moments: MomentsRef, device: str) -> torch.Tensor:
    # Two at a time: a layer's experts come one after the other and alternate between w13 and w2.
    with TensorReader(moments.root) as reader:
        return inverse_factor(reader.read(moments.entry).to(device), moments.entry.name)


@dataclass(frozen=True)
class ExpertTask:
    """One expert projection to W4AFP8.

    Attributes:
        name: its parsed main tensor name.
        parts: the source tensors.
        format_name: source format.
        shape: ``(N, K)``.
        group_size: of the result.
        options: how to round.
        moments: second moments of its inputs, for ``gptq``.
        input_scale: static activation scale to store, or None.
        input_scale_name: under which name.
    """

    name: ExpertName
    parts: ExpertParts
    format_name: str
    shape: tuple[int, int]
    group_size: int
    options: ConvertOptions
    moments: MomentsRef | None = None
    input_scale: float | None = None
    input_scale_name: str = ""

    @property
    def key(self) -> str:
        """``…experts.5.gate_proj``."""
        return self.name.prefix

    @property
    def sources(self) -> list[TensorEntry]:
        """The parts."""
        return list(self.parts.parts.values())

    def outputs(self) -> list[OutTensor]:
        """Weight, scales and, for static activations, the input scale."""
        rows, columns = self.shape
        made = [
            OutTensor(f"{self.key}.weight", "I8", (rows, columns // 2)),
            OutTensor(f"{self.key}.weight_scale_inv", "BF16", (rows, columns // self.group_size)),
        ]
        if self.input_scale is not None:
            made.append(OutTensor(self.input_scale_name, "BF16", (1,)))
        return made

    def make(self, reader: TensorReader, device: str) -> Made:
        """Read, round (or take over), pack."""
        weight = _format(self.format_name).load(self.parts, reader.read)
        stats = None
        if isinstance(weight, FloatWeight) or self.options.requantize:
            # On a GPU this includes the copies there and back: they overlap other workers' reads.
            with reader.stages.measure("compute"):
                packed, scale, stats, minus_eight = self._round(_to_float(weight), device)
        else:
            packed = weight.packed
            scale = resize_group_scale(weight.scale, weight.group_size, self.group_size)
            minus_eight = has_minus_eight(packed)
        tensors = {f"{self.key}.weight": packed, f"{self.key}.weight_scale_inv": scale}
        if self.input_scale is not None:
            value = torch.tensor([self.input_scale], dtype=torch.bfloat16)
            tensors[self.input_scale_name] = value
        return Made(tensors, stats, minus_eight)

    def _round(
        self, source: FloatWeight, device: str
    ) -> tuple[torch.Tensor, torch.Tensor, ErrorStats, bool]:
        packed, scale, stats = quantize_weight(
            source.data.to(device, non_blocking=True),
            None if source.scale is None else source.scale.to(device, non_blocking=True),
            source.block,
            method=self.options.method,
            group_size=self.group_size,
            symmetric=self.options.symmetric,
            factor=None if self.moments is None else _factor(self.moments, device),
            name=self.key,
        )
        # Some methods cannot make a −8; looking for one would cost time for nothing.
        symmetric = self.options.symmetric or self.options.method == "rtn"
        minus_eight = not symmetric and has_minus_eight(packed)
        return _to_host(packed), _to_host(scale), stats, minus_eight


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU; from a GPU by way of page-locked memory, several times as fast."""
    if not tensor.is_cuda:
        return tensor
    made = torch.empty_like(tensor, device="cpu", pin_memory=True)
    made.copy_(tensor)  # returns when the bytes are there
    return made


@dataclass(frozen=True)
class UnpackTask:
    """One expert projection of a kept layer to BF16.

    A layer that is not quantised is loaded as BF16, so a kept layer of an FP8 or INT4 checkpoint
    has to be unpacked. A BF16 layer is copied instead.

    Attributes:
        name: its parsed main tensor name.
        parts: the source tensors.
        format_name: source format.
        shape: ``(N, K)``.
    """

    name: ExpertName
    parts: ExpertParts
    format_name: str
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """``…experts.5.gate_proj``."""
        return self.name.prefix

    @property
    def sources(self) -> list[TensorEntry]:
        """The parts."""
        return list(self.parts.parts.values())

    def outputs(self) -> list[OutTensor]:
        """One BF16 matrix."""
        return [OutTensor(f"{self.key}.weight", "BF16", self.shape)]

    def make(self, reader: TensorReader, device: str) -> Made:
        """Read and unpack."""
        weight = _to_float(_format(self.format_name).load(self.parts, reader.read))
        result = torch.empty(self.shape, dtype=torch.bfloat16)
        for start, stop in _row_blocks(*self.shape):
            part = float_rows(weight.data, weight.scale, weight.block, start, stop)
            result[start:stop] = part.to(torch.bfloat16)
        return Made({f"{self.key}.weight": result})


def _row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, (1 << 19) // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
