"""A part of one expert projection from tensors in memory, through the formats that read files.

A rank needs a part of every expert. The part is widened to whole groups and whole FP8 blocks, cut
out of the source's tensors, and then is an ordinary small matrix of the same format. Groups and
blocks are independent of each other, so codes and scales of the part are those of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Int4Weight, detect
from sglang_w4afp8.checkpoint.gptq import unpack_words, zero_offset
from sglang_w4afp8.checkpoint.index import DTYPE_NAMES, TensorEntry
from sglang_w4afp8.errors import CheckpointError

# Stored (K, N): rows of the tensor run along K.
_TRANSPOSED = ("qweight", "scales")


@dataclass(frozen=True)
class Window:
    """Rows and columns of an ``(N, K)`` matrix.

    Attributes:
        shape: ``(N, K)`` of the whole.
        rows: along N.
        columns: along K.
    """

    shape: tuple[int, int]
    rows: slice
    columns: slice

    @classmethod
    def around(
        cls,
        shape: tuple[int, int],
        rows: slice,
        columns: slice,
        group_size: int,
        block: tuple[int, int] | None,
        tensors: Mapping[str, torch.Tensor],
    ) -> Window:
        """The smallest window of whole groups and blocks that holds ``rows`` and ``columns``.

        Args:
            shape: ``(N, K)``.
            rows: wanted.
            columns: wanted.
            group_size: of the result.
            block: FP8 block of the source, or None.
            tensors: the source's parts; INT4 scales tell the source's own group.
        """
        unit_n, unit_k = block or (1, 1)
        unit_k = lcm(unit_k, group_size)
        for part, axis in (("weight_scale", 1), ("scales", 0)):
            scale = tensors.get(part)
            # One scale per channel spans the whole axis: any cut will do.
            if scale is not None and scale.dim() == 2 and scale.shape[axis] > 1:
                unit_k = lcm(unit_k, max(1, shape[1] // scale.shape[axis]))
        return cls(shape, _widened(rows, unit_n, shape[0]), _widened(columns, unit_k, shape[1]))


def _widened(part: slice, unit: int, full: int) -> slice:
    return slice(part.start // unit * unit, min(-(-part.stop // unit) * unit, full))


def _cut(
    part: str, tensor: torch.Tensor, window: Window, block: tuple[int, int] | None
) -> torch.Tensor:
    axes = (0, 1) if part in _TRANSPOSED else (1, 0)
    if tensor.dim() != 2:
        return tensor
    for axis, along_n in zip(axes, (False, True), strict=True):
        full = window.shape[0 if along_n else 1]
        wanted = window.rows if along_n else window.columns
        size = tensor.shape[axis]
        if size == 1 and full != 1:
            continue  # one scale for the whole axis
        unit = -(-full // size)
        if block is not None and part != "weight":
            unit = block[0 if along_n else 1]
        tensor = tensor.narrow(
            axis, wanted.start // unit, -(-wanted.stop // unit) - wanted.start // unit
        )
    return tensor


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), "", 0, tensor.nbytes)


def _bundle(
    prefix: str, tensors: Mapping[str, torch.Tensor], quant: Mapping[str, Any]
) -> ExpertParts:
    entries = {part: _entry(f"{prefix}.{part}", tensor) for part, tensor in tensors.items()}
    return ExpertParts(prefix, entries, quant)


def load_window(
    prefix: str,
    tensors: Mapping[str, torch.Tensor],
    quant: Mapping[str, Any],
    window: Window,
    block: tuple[int, int] | None,
) -> FloatWeight | Int4Weight:
    """The window of a projection as a format's :meth:`load` gives a whole one.

    Args:
        prefix: ``…experts.5.gate_proj``, for messages.
        tensors: part name → whole tensor on the CPU or a GPU; only views of them are made.
        quant: the source's ``quantization_config``.
        window: see :meth:`Window.around`.
        block: FP8 block, or None.

    Raises:
        CheckpointError: the tensors do not have the announced size, fit no format, or are INT4 that
            cannot be taken over.
    """
    whole = _bundle(prefix, tensors, quant)
    source = detect(whole)
    reason = source.inexact(whole)
    if source.shape(whole) != window.shape or reason:
        raise CheckpointError(
            f"{prefix}: {', '.join(f'{part} {list(t.shape)}' for part, t in tensors.items())}",
            reason or f"the model's sizes make it {list(window.shape)}",
            [
                "sglang-w4afp8 inspect CHECKPOINT lists what is in it",
                "sglang-w4afp8 convert SRC DST --requantize",
            ],
        )
    parts = {part: _cut(part, tensor, window, block) for part, tensor in tensors.items()}
    bundle = _bundle(prefix, parts, quant)
    by_name = {bundle.parts[part].name: tensor for part, tensor in parts.items()}
    return source.load(bundle, lambda entry: by_name[entry.name])


def check_extra(
    prefix: str, part: str, tensor: torch.Tensor, shape: tuple[int, int], quant: Mapping[str, Any]
) -> None:
    """Look at a part that holds no weights but says whether the weights can be taken over.

    Args:
        prefix: ``…experts.5.gate_proj``.
        part: ``weight_shape``, ``weight_zero_point``, ``weight_g_idx``, ``qzeros`` or ``g_idx``.
        tensor: whole.
        shape: ``(N, K)`` of the projection.
        quant: the source's ``quantization_config``.

    Raises:
        CheckpointError: they cannot.
    """
    rows, columns = shape
    found = None
    if part == "weight_shape":
        stated = tuple(int(extent) for extent in tensor.tolist())
        if stated != shape:
            found = f"weight_shape {list(stated)} where the model has {list(shape)}"
    elif part == "qzeros":
        zeros = unpack_words(tensor)[:, :rows] + zero_offset(quant)
        if bool((zeros != 8).any()):
            found = "qzeros hold other values than 8: the weights are asymmetric"
    elif part == "g_idx":
        size = int(quant.get("group_size", 128))
        order = torch.arange(columns, device=tensor.device) // (columns if size < 0 else size)
        if tensor.numel() != columns or bool((tensor != order).any()):
            found = "g_idx is not i // group_size: act-order permutes the groups"
    elif part == "weight_zero_point":
        found = "weight_zero_point: the weights are asymmetric"
    elif part == "weight_g_idx":
        found = "weight_g_idx: activation ordering permutes the groups"
    if found:
        raise CheckpointError(
            f"{prefix}: {found}",
            "W4AFP8 codes lie in −8…7 around zero, in contiguous groups along K; taking these over "
            "would need rounding them once more",
            [
                "sglang-w4afp8 convert SRC DST --requantize",
                "sglang-w4afp8 convert SRC DST  with the BF16 or FP8 checkpoint as SRC",
            ],
        )
