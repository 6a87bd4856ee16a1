"""GPTQ: rounding that lets later columns make up for the error of earlier ones.

For inputs x with second moment H = E[x xᵀ], the loss of a rounded row is (w − ŵ) H (w − ŵ)ᵀ.
Columns are rounded in order; the error of each is pushed onto the columns not yet rounded, along
the inverse of H, by way of its Cholesky factor. Scales are searched (:mod:`.mse`) group by group,
on the weights as they are when the group's turn comes. Columns are never reordered: groups must
stay contiguous along K.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import INT4_MAX, INT4_MIN
from sglang_w4afp8.quantize.mse import quantize_mse

_DAMPING = (0.01, 0.1, 1.0)  # fractions of the mean diagonal, the first that makes H invertible


def inverse_factor(hessian: torch.Tensor, name: str = "hessian") -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse, what :func:`quantize_gptq` works with.

    Args:
        hessian: ``(K, K)`` second moments of the inputs, any float dtype; only its scale-free
            shape matters.
        name: for messages.

    Returns:
        ``(K, K)`` float32 upper triangular U with Uᵀ U = (H + λ I)⁻¹.

    Raises:
        CheckpointError: not square, not finite, or a negative diagonal.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise CheckpointError(
            f"{name} has shape {list(hessian.shape)}",
            "second moments are a square matrix",
            ["calibrate again", "--method mse  needs no calibration"],
        )
    moments = hessian.to(torch.float32)
    diagonal = moments.diagonal()
    if not bool(moments.isfinite().all()) or bool((diagonal < 0).any()):
        raise CheckpointError(
            f"{name} is not finite or has a negative diagonal",
            "second moments of activations are finite and not negative",
            ["calibrate again", "--method mse  needs no calibration"],
        )
    mean = diagonal.mean().clamp(min=1e-30)
    # An input that never fires leaves its column free: give it the mean, not a zero pivot.
    fill = torch.where(diagonal > 0, torch.zeros_like(diagonal), mean.expand_as(diagonal))
    for damping in _DAMPING:
        damped = moments + torch.diag(fill + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped / mean)
        if int(failed):
            continue
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed):
            return upper
    raise CheckpointError(
        f"{name} cannot be inverted",
        "even damping by its mean diagonal leaves it indefinite: it is no second moment",
        ["calibrate again", "--method mse  needs no calibration"],
    )


def quantize_gptq(
    weight: torch.Tensor, factor: torch.Tensor, group_size: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix.

    Args:
        weight: ``(N, K)`` float32; not changed.
        factor: ``(K, K)`` from :func:`inverse_factor`, on the same device.
        group_size: codes per scale along K.
        symmetric: codes −7…7 and positive scales only.

    Returns:
        codes ``(N, K/g, g)`` float32 holding integers, and scales ``(N, K/g)`` float32.
    """
    rows, columns = weight.shape
    low = float(-INT4_MAX if symmetric else INT4_MIN)
    work = weight.clone()
    codes = torch.empty(rows, columns, device=weight.device)
    scales = torch.empty(rows, columns // group_size, device=weight.device)
    for group in range(columns // group_size):
        start, stop = group * group_size, (group + 1) * group_size
        part = work[:, start:stop]
        _, scale = quantize_mse(part.unsqueeze(1), symmetric=symmetric)
        scales[:, group] = scale[:, 0]
        errors = torch.empty_like(part)
        for j in range(group_size):
            column = start + j
            code = (part[:, j] / scale[:, 0]).round_().clamp_(low, float(INT4_MAX))
            codes[:, column] = code
            error = (part[:, j] - code * scale[:, 0]) / factor[column, column]
            part[:, j + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 : stop]
            errors[:, j] = error
        # The columns after the group need the sum of its errors only once.
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.view(rows, -1, group_size), scales
