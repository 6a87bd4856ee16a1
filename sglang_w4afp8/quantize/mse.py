"""Searched scales: per group, the scale with the least squared error.

For codes q(c) = clamp(round(c·w)) the best scale is the least-squares one, s = ⟨w,q⟩/⟨q,q⟩, and the
error it leaves is ⟨w,w⟩ − ⟨w,q⟩²/⟨q,q⟩. So only the quotient ⟨w,q⟩²/⟨q,q⟩ has to be compared over a
grid of multipliers c: no candidate is ever dequantised. The winner's scale is rounded to BF16 and
the codes are taken once more for exactly that scale.

``full_range`` also lets the scale be negative and uses the code −8: the grid then has sixteen codes
instead of fifteen and its long side faces the group's largest weight. That is worth about 0.8 dB,
and it costs nothing in the format; kernels that store sign and magnitude have no −8, so it is a
choice, not the default.
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
_GRID = (6.5, 20)
_FULL_GRID = (7.0, 18)


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


def plan_search(groups: torch.Tensor, *, full_range: bool = False) -> Search:
    """The candidates for ``(R, G, g)`` float32 groups."""
    first, steps = _FULL_GRID if full_range else _GRID
    amax = groups.abs().amax(dim=-1)
    unit = torch.where(amax > 0, amax, torch.ones_like(amax)).reciprocal_()
    if full_range:
        # −8 is the only code without a mirror image: give it to the side of the largest weight.
        unit = torch.where(groups.amax(dim=-1) >= amax, -unit, unit)
    low = float(INT4_MIN if full_range else -INT4_MAX)
    return Search(unit, amax / INT4_MAX, first, _STEP, steps, low, float(INT4_MAX))


def search_scales(groups: torch.Tensor, *, full_range: bool = False) -> torch.Tensor:
    """The scale of least squared error of every group, among those the grid tries.

    Args:
        groups: ``(R, G, g)`` float32 weights; not changed.
        full_range: allow negative scales and the code −8.

    Returns:
        ``(R, G)`` float32, not yet rounded to BF16.
    """
    search = plan_search(groups, full_range=full_range)
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
    groups: torch.Tensor, *, full_range: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups with searched scales.

    Args:
        groups: ``(R, G, g)`` float32 weights; not changed.
        full_range: allow negative scales and the code −8.

    Returns:
        codes ``(R, G, g)`` float32 holding integers, and scales ``(R, G)`` float32, representable
        in BF16 (negative ones only with ``full_range``).
    """
    scale = round_scale(search_scales(groups, full_range=full_range))
    codes = groups * scale.reciprocal().unsqueeze(-1)
    low = INT4_MIN if full_range else -INT4_MAX
    return codes.round_().clamp_(low, INT4_MAX), scale
