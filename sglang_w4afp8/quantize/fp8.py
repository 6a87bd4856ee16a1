"""Block-FP8 weights: decoding E4M3 fast on a CPU, applying block scales, resizing blocks exactly.

A block-FP8 matrix is ``(N, K)`` float8_e4m3fn plus ``(ceil(N/n), ceil(K/k))`` scales that are
*multiplied*, although the checkpoints call them ``weight_scale_inv``. The last block of an axis may
be ragged. Scales are float32, bfloat16, or E8M0 (powers of two, DeepSeek-V3.1 and later).
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.reference import FP8_MAX

_MAGNITUDE_NAN = 0x7F


def decode_e4m3(weight: torch.Tensor) -> torch.Tensor:
    """E4M3 to float32, exactly.

    On a CPU torch converts one element at a time (3 ns each); moving the bits into a float16 and
    rescaling by 2⁸ is vectorised and ten times faster. E4M3's subnormals become float16 subnormals,
    so nothing is rounded. Only NaN, magnitude 0x7F, has no counterpart there; a tensor that holds
    one takes torch's way.

    Args:
        weight: any shape, float8_e4m3fn.

    Returns:
        Same shape, float32.
    """
    if weight.is_cuda or has_nan_e4m3(weight):
        return weight.to(torch.float32)
    # A sign-extended byte s mmmmmmm shifted left by 7 is s s mmmmmmm 0000000; clearing bit 14
    # leaves float16's sign, a zero top exponent bit, and the seven magnitude bits in place.
    bits = weight.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(torch.float32).mul_(256.0)


def has_nan_e4m3(weight: torch.Tensor) -> bool:
    """Whether an E4M3 tensor holds NaN, the only non-finite value of the format."""
    magnitude = weight.view(torch.uint8).bitwise_and(0x7F)
    return bool(magnitude.numel()) and int(magnitude.max()) == _MAGNITUDE_NAN


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale tensor that an ``(N, K)`` matrix has under ``(n, k)`` blocks."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def apply_block_scale(
    rows: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first_row: int
) -> torch.Tensor:
    """Multiply a run of rows by their block scales, in place where possible.

    Args:
        rows: ``(R, K)`` float32, rows ``first_row … first_row + R − 1`` of the matrix.
        scale: ``(ceil(N/n), ceil(K/k))`` float32, all of the matrix.
        block: ``(n, k)``.
        first_row: position of ``rows`` in the matrix.

    Returns:
        ``(R, K)`` float32.
    """
    count, columns = rows.shape
    index = torch.arange(first_row, first_row + count, device=rows.device) // block[0]
    per_row = scale[index]  # (R, ceil(K/k))
    if columns % block[1] == 0:
        rows.view(count, -1, block[1]).mul_(per_row.unsqueeze(-1))
        return rows
    return rows.mul_(per_row.repeat_interleave(block[1], dim=1)[:, :columns])


def resize_block_scale(
    scale: torch.Tensor,
    shape: tuple[int, int],
    block: tuple[int, int],
    new_block: tuple[int, int],
) -> torch.Tensor:
    """Scales of the same FP8 weight under smaller blocks: repetition, so no value changes.

    Args:
        scale: ``(ceil(N/n), ceil(K/k))``, any dtype.
        shape: ``(N, K)`` of the weight; the last block may be ragged.
        block: ``(n, k)`` of ``scale``.
        new_block: must divide ``block`` along both axes.

    Returns:
        ``(ceil(N/n'), ceil(K/k'))`` in the dtype of ``scale``.

    Raises:
        CheckpointError: the new block does not divide the old one.
    """
    if block[0] % new_block[0] or block[1] % new_block[1]:
        raise CheckpointError(
            f"blocks of {block[0]}x{block[1]} to be cut into {new_block[0]}x{new_block[1]}",
            "only a divisor keeps every new block inside one old block, so that scales can be "
            "repeated; anything else would need requantisation",
            [f"--block {block[0] // 2}"],
        )
    rows, columns = block_grid(shape, new_block)
    raw = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    taller = raw.repeat_interleave(block[0] // new_block[0], dim=0)[:rows]
    resized = taller.repeat_interleave(block[1] // new_block[1], dim=1)[:, :columns].contiguous()
    return resized.view(scale.dtype)


def quantize_fp8_block(
    values: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to block-FP8, each block's largest magnitude becoming 448.

    Args:
        values: ``(N, K)`` float32; both are whole numbers of blocks.
        block: ``(n, k)``.

    Returns:
        ``(N, K)`` float8_e4m3fn and ``(N/n, K/k)`` float32, to be multiplied. A block of zeros has
        scale 1.
    """
    rows, columns = values.shape[0] // block[0], values.shape[1] // block[1]
    tiles = values.view(rows, block[0], columns, block[1])
    largest = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    # The division may end a hair above 448, which E4M3 would turn into NaN.
    codes = (tiles / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view_as(values), scale
