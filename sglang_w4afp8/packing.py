"""INT4 packing as the public W4AFP8 checkpoints have it.

Two signed two's-complement nibbles to a byte, along K: the low nibble is the even k, the high
nibble the odd one. No offset, no interleave, no transposition. The layout is that of SGLang's
``W4AFp8MoEMethod`` parameters and of the published DeepSeek, GLM and Kimi W4AFP8 checkpoints;
``docs/checkpoint-format.md`` has it in words and pictures.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError

INT4_MIN, INT4_MAX = -8, 7
_SCAN_BYTES = 1 << 18


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack signed INT4 codes, two to a byte along the last dimension.

    Args:
        codes: ``(..., K)`` integer tensor, values −8…7, K even.

    Returns:
        ``(..., K/2)`` int8.

    Raises:
        CheckpointError: K is odd or a value lies outside −8…7.
    """
    if codes.shape[-1] % 2:
        raise CheckpointError(
            f"{codes.shape[-1]} INT4 codes in a row",
            "two codes share a byte, so a row must hold an even number of them",
            ["pad the row with a zero code"],
        )
    if codes.numel():
        low, high = (int(bound) for bound in codes.aminmax())
        if low < INT4_MIN or high > INT4_MAX:
            raise CheckpointError(
                f"codes from {low} to {high}",
                f"a signed INT4 code lies in {INT4_MIN}…{INT4_MAX}",
                ["clamp the codes after rounding"],
            )
    # Two neighbours as one little-endian 16-bit word, 0x0H0L: one shift brings H beside L.
    words = (codes.to(torch.int8) & 0x0F).contiguous().view(torch.int16)
    return (words | (words >> 4)).to(torch.uint8).view(torch.int8)


def unpack_int4(packed: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: ``(..., K/2)`` int8 or uint8.
        dtype: of the result.

    Returns:
        ``(..., K)`` codes −8…7 in ``dtype``.
    """
    signed = packed.view(torch.int8)
    # An arithmetic shift of a signed byte keeps the sign: the high nibble directly, the low one
    # after it has been moved up. No table, no branch.
    low = (signed << 4) >> 4
    high = signed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2).to(dtype)


def has_minus_eight(packed: torch.Tensor) -> bool:
    """Whether the code −8 occurs in ``packed`` (``(..., K/2)`` int8).

    Kernels that store a sign and a magnitude have no code for −8 and pick a slower conversion.
    """
    flat = packed.reshape(-1).view(torch.uint8)
    # A CPU stops at the first one, usually in the first piece; a GPU would wait for every answer.
    for byte in flat.split(flat.numel() or 1 if packed.is_cuda else _SCAN_BYTES):
        if bool((((byte & 0x0F) == 0x08) | ((byte & 0xF0) == 0x80)).any()):
            return True
    return False
