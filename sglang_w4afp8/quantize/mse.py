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

import torch

from sglang_w4afp8.packing import INT4_MAX, INT4_MIN
from sglang_w4afp8.quantize.rtn import round_scale

# Multipliers as the (fractional) code that the group's largest magnitude maps to. Above 7 the
# largest weights are clipped. 7 itself is included, so the search is never worse than rtn.
_GRID = tuple(7.0 + 0.5 * step for step in range(-1, 19))
_FULL_GRID = tuple(7.5 + 0.5 * step for step in range(-1, 17))


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
    low = float(INT4_MIN if full_range else -INT4_MAX)
    amax = groups.abs().amax(dim=-1)
    unit = torch.where(amax > 0, amax, torch.ones_like(amax)).reciprocal_()
    multipliers = _GRID
    if full_range:
        multipliers = _FULL_GRID
        # −8 is the only code without a mirror image: give it to the side of the largest weight.
        peak = groups.amax(dim=-1)
        unit = torch.where(peak >= amax, -unit, unit)
    best_gain = torch.full_like(amax, -1.0)
    # Groups whose squares underflow, or that are zero, never win below and keep this scale.
    best_scale = amax / INT4_MAX
    codes = torch.empty_like(groups)
    for multiplier in multipliers:
        torch.mul(groups, (unit * multiplier).unsqueeze(-1), out=codes)
        codes.round_().clamp_(low, float(INT4_MAX))
        dot = torch.linalg.vecdot(groups, codes)  # (R, G)
        energy = torch.linalg.vecdot(codes, codes)
        scale = dot / energy
        gain = dot * scale
        better = gain > best_gain  # False for a group of zeros, whose gain is NaN
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = round_scale(best_scale)
    torch.mul(groups, best_scale.reciprocal().unsqueeze(-1), out=codes)
    return codes.round_().clamp_(low, float(INT4_MAX)), best_scale
