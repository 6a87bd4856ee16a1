"""The scale search of :mod:`.mse` as one CUDA kernel, written in Triton.

Torch's elementwise operations would pass a matrix through memory some hundred times, six for each
candidate; here a group stays in registers while all candidates are tried. The arithmetic is that of
:func:`.mse.search_scales`, without contraction of a multiplication and an addition into one
rounding; only the order of the sums over a group differs from a CPU's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_w4afp8.errors import HostError

_ELEMENTS = 2048  # per program: 16 a thread with four warps


@functools.cache
def _kernel() -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise HostError(
            f"triton cannot be imported: {error}",
            "the scale search runs as a Triton kernel on CUDA devices",
            ["pip install triton", "--device cpu"],
        ) from error

    @triton.jit
    def search(  # type: ignore[no-untyped-def]
        groups, unit, scale, count, low, high, first, step, steps,
        width: tl.constexpr, rows: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        column = tl.arange(0, width)
        inside = row < count
        place = row[:, None].to(tl.int64) * width + column[None, :]
        weight = tl.load(groups + place, mask=inside[:, None], other=0.0)
        per_row = tl.load(unit + row, mask=inside, other=0.0)
        best = tl.load(scale + row, mask=inside, other=0.0)
        best_gain = tl.full((rows,), -1.0, tl.float32)
        for index in range(steps):
            factor = per_row * (first + step * index)
            code = weight * factor[:, None]
            # Adding and subtracting 1.5 * 2**23 rounds to the nearest integer, ties to even.
            code = (code + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(code, low), high)
            dot = tl.sum(weight * code, axis=1)
            energy = tl.sum(code * code, axis=1)
            candidate = tl.div_rn(dot, energy)
            gain = dot * candidate
            better = gain > best_gain  # False for a group of zeros, whose gain is NaN
            best_gain = tl.where(better, gain, best_gain)
            best = tl.where(better, candidate, best)
        tl.store(scale + row, best, mask=inside)

    return search


def search_scales_cuda(
    groups: torch.Tensor,
    unit: torch.Tensor,
    fallback: torch.Tensor,
    first: float,
    step: float,
    steps: int,
    low: float,
    high: float,
) -> torch.Tensor:
    """Least-squares scale of the best candidate of every group.

    Args:
        groups: ``(R, G, g)`` float32 on a CUDA device, g a power of two.
        unit: ``(R, G)`` float32: what a weight is multiplied with, per unit of multiplier.
        fallback: ``(R, G)`` float32: the scale of groups in which no candidate has a gain.
        first: smallest multiplier.
        step: between multipliers.
        steps: how many.
        low: smallest code.
        high: largest code.

    Returns:
        ``(R, G)`` float32.

    Raises:
        HostError: Triton is missing.
    """
    width = groups.shape[-1]
    flat = groups.contiguous().view(-1, width)
    scale = fallback.contiguous().clone()
    rows = max(1, _ELEMENTS // width)
    _kernel()[(-(-flat.shape[0] // rows),)](
        flat, unit.contiguous(), scale, flat.shape[0], low, high, first, step, steps,
        width=width, rows=rows, enable_fp_fusion=False,
    )  # fmt: skip
    return scale
