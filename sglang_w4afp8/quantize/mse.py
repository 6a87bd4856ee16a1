"""Searched scales: per group, the scale with the least squared error.

For codes q(c) = clamp(round(c·w)) the best scale is the least-squares one, s = ⟨w,q⟩/⟨q,q⟩, and the
error it leaves is ⟨w,w⟩ − ⟨w,q⟩²/⟨q,q⟩. So only the quotient ⟨w,q⟩²/⟨q,q⟩ has to be compared over a
grid of multipliers c: no candidate is ever dequantised. The winner's scale is rounded to BF16 and
the codes are taken once more for exactly that scale.

The scale may be negative: the grid has sixteen codes, −8…7, and its long side faces the group's
largest weight. With fifteen codes, −7…7, and a positive scale (``symmetric``), no choice of scales
gains more than 1.0 dB over absmax / 7, for any of the distributions tried
(``benchmarks/rounding_snr.py`` computes that bound); the sixteenth code is worth 0.8 dB more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_w4afp8.packing import INT4_MAX, INT4_MIN
from sglang_w4afp8.quantize.rtn import round_scale

# Multipliers as the (fractional) code that the group's largest magnitude maps to. Above 7 the
# largest weights are clipped. 7 itself is included, so the search is never worse than rtn.
# First multiplier and how many, _STEP apart.
_STEP = 0.5
_GRID = (7.0, 18)
_SYMMETRIC_GRID = (6.5, 20)


class Search(NamedTuple):
    """What to try for every group.

    Attributes:
        unit: ``(R, G)`` float32: the code of a weight w at multiplier m is round(w · unit · m).
        fallback: ``(R, G)`` float32: scale of a group in which no candidate has a gain (all zeros,
            or squares that underflow).
        first: smallest multiplier.
        step: between multipliers.
        steps: how many.
        low: smallest code.
        high: largest code.
    """

    unit: torch.Tensor
    fallback: torch.Tensor
    first: float
    step: float
    steps: int
    low: float
    high: float


def plan_search(groups: torch.Tensor, *, symmetric: bool = False) -> Search:
    """The candidates for ``(R, G, g)`` float32 groups."""
    first, steps = _SYMMETRIC_GRID if symmetric else _GRID
    amax = groups.abs().amax(dim=-1)
    unit = torch.where(amax > 0, amax, torch.ones_like(amax)).reciprocal_()
    if not symmetric:
        # −8 is the only code without a mirror image: give it to the side of the largest weight.
        unit = torch.where(groups.amax(dim=-1) >= amax, -unit, unit)
    low = float(-INT4_MAX if symmetric else INT4_MIN)
    return Search(unit, amax / INT4_MAX, first, _STEP, steps, low, float(INT4_MAX))


def search_scales(groups: torch.Tensor, *, symmetric: bool = False) -> torch.Tensor:
    """The scale of least squared error of every group, among those the grid tries.

    Args:
        groups: ``(R, G, g)`` float32 weights; not changed.
        symmetric: codes −7…7 and positive scales only.

    Returns:
        ``(R, G)`` float32, not yet rounded to BF16.
    """
    search = plan_search(groups, symmetric=symmetric)
    if groups.is_cuda:
        from sglang_w4afp8.quantize.search_cuda import search_scales_cuda

        return search_scales_cuda(groups, *search)
    best_scale = search.fallback
    best_gain = torch.full_like(best_scale, -1.0)
    codes = torch.empty_like(groups)
    for index in range(search.steps):
        factor = search.unit * (search.first + search.step * index)
        torch.mul(groups, factor.unsqueeze(-1), out=codes)
        codes.round_().clamp_(search.low, search.high)
        dot = torch.linalg.vecdot(groups, codes)  # (R, G)
        energy = torch.linalg.vecdot(codes, codes)
        scale = dot / energy
        gain = dot * scale
        better = gain > best_gain  # False for a group of zeros, whose gain is NaN
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def quantize_mse(
    groups: torch.Tensor, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups with searched scales.

    Args:
        groups: ``(R, G, g)`` float32 weights; not changed.
        symmetric: codes −7…7 and positive scales only.

    Returns:
        codes ``(R, G, g)`` float32 holding integers, and scales ``(R, G)`` float32, representable
        in BF16 (negative ones not with ``symmetric``).
    """
    scale = round_scale(search_scales(groups, symmetric=symmetric))
    codes = groups * scale.reciprocal().unsqueeze(-1)
    low = -INT4_MAX if symmetric else INT4_MIN
    return codes.round_().clamp_(low, INT4_MAX), scale
