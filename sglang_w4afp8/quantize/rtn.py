"""Round to nearest: scale = absmax / 7, the recipe of the first public W4AFP8 checkpoints.

Codes lie in −7…7. The scale is rounded to BF16 first and the codes are those of the rounded scale,
because that is what a kernel multiplies with.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.packing import INT4_MAX


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as BF16 can hold them, in float32; zero and vanishing ones become 1.

    A group of zeros gets scale 1 and codes 0, so no reader ever divides by zero; a scale below the
    smallest normal BF16 is treated alike (kernels may flush it).
    """
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    tiny = torch.finfo(torch.bfloat16).tiny
    return torch.where(rounded.abs() < tiny, torch.ones_like(rounded), rounded)


def absmax_scale(groups: torch.Tensor, divisor: float = float(INT4_MAX)) -> torch.Tensor:
    """BF16-representable absmax scales.

    Args:
        groups: ``(R, G, g)`` float32 weights.
        divisor: the code that the largest magnitude maps to.

    Returns:
        ``(R, G)`` float32.
    """
    return round_scale(groups.abs().amax(dim=-1).div_(divisor))


def quantize_rtn(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups by absmax.

    Args:
        groups: ``(R, G, g)`` float32 weights; not changed.

    Returns:
        codes ``(R, G, g)`` float32 holding integers −7…7, and scales ``(R, G)`` float32.
    """
    scale = absmax_scale(groups)
    codes = groups * scale.reciprocal().unsqueeze(-1)
    return codes.round_().clamp_(-INT4_MAX, INT4_MAX), scale
