"""compressed-tensors ``pack-quantized`` INT4 (llm-compressor's W4AFP8 and W4A16 presets, Kimi-K2).

``weight_packed`` is int32 ``(N, K/8)``; bits 4i … 4i+3 of a word hold element 8r + i along K as
q + 8. On a little-endian machine the bytes of such a word are already in W4AFP8's nibble order, and
adding 8 to a signed nibble flips its top bit: XOR with 0x88 turns one format into the other, and no
code changes. ``weight_scale`` is ``(N, K/g)``, or ``(N, 1)`` per channel.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Int4Weight, Read
from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import unpack_int4


def _bits(parts: ExpertParts) -> int:
    for group in (parts.quant.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("num_bits") is not None:
            return int(weights["num_bits"])
    return 4


def int4_from_words(words: torch.Tensor) -> torch.Tensor:
    """Offset-binary int32 words ``(N, K/8)`` to W4AFP8 bytes ``(N, K/2)`` int8."""
    return words.contiguous().view(torch.uint8).bitwise_xor(0x88).view(torch.int8)


class PackQuantized:
    """See the module docstring."""

    name = "pack-quantized"

    def matches(self, parts: ExpertParts) -> bool:
        packed = parts.parts.get("weight_packed")
        return packed is not None and packed.dtype == "I32"

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        packed, scale = parts.entry("weight_packed"), parts.entry("weight_scale")
        bits = _bits(parts)
        if bits != 4:
            raise CheckpointError(
                f"{parts.prefix}: {bits}-bit weights",
                "W4AFP8 experts are 4-bit",
                ["convert from the BF16 or FP8 checkpoint instead"],
            )
        rows, columns = packed.shape[0], packed.shape[1] * 8
        if scale.shape[0] != rows or columns % scale.shape[1]:
            raise CheckpointError(
                f"{parts.prefix}: {columns} columns with scales {list(scale.shape)}",
                "every row needs the same number of whole groups",
                ["download the shard again"],
            )
        return rows, columns

    def _source_group(self, parts: ExpertParts) -> int:
        return self.shape(parts)[1] // parts.entry("weight_scale").shape[1]

    def group_size(self, parts: ExpertParts) -> int | None:
        return None if self.inexact(parts) else self._source_group(parts)

    def inexact(self, parts: ExpertParts) -> str | None:
        if "weight_zero_point" in parts.parts:
            return "the weights are asymmetric: q − zero point spans −15…15, more than four bits"
        if "weight_g_idx" in parts.parts:
            return "activation ordering permutes the groups, so they are not contiguous along K"
        return None

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight | Int4Weight:
        rows, columns = self.shape(parts)
        if "weight_shape" in parts.parts:
            stated = tuple(read(parts.entry("weight_shape")).tolist())
            if stated != (rows, columns):
                raise CheckpointError(
                    f"{parts.prefix}: weight_shape {stated}, packed {rows}x{columns}",
                    "a padded weight cannot be taken over: its last group mixes in the padding",
                    ["convert from the BF16 or FP8 checkpoint instead"],
                )
        scale = read(parts.entry("weight_scale"))
        packed = int4_from_words(read(parts.entry("weight_packed")))
        group = self._source_group(parts)
        if self.inexact(parts) is None:
            return Int4Weight(packed, scale.to(torch.bfloat16), group)
        codes = unpack_int4(packed, torch.float32)
        if "weight_zero_point" in parts.parts:
            codes -= (
                self._zero_points(parts, read, rows, scale.shape[1])[:, :, None]
                .expand(-1, -1, group)
                .reshape(rows, columns)
            )
        if "weight_g_idx" in parts.parts:
            index = read(parts.entry("weight_g_idx")).to(torch.int64)
        else:
            index = torch.arange(columns) // group
        return FloatWeight(codes * scale.to(torch.float32)[:, index])

    def _zero_points(self, parts: ExpertParts, read: Read, rows: int, groups: int) -> torch.Tensor:
        # Packed along N: word r of a group column holds rows 8r … 8r + 7.
        stored = read(parts.entry("weight_zero_point"))
        if stored.dtype != torch.int32:
            return stored.to(torch.float32).reshape(rows, groups)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        nibbles = (stored.unsqueeze(1) >> shifts[None, :, None]) & 0xF  # (N/8, 8, G)
        return nibbles.flatten(0, 1)[:rows].to(torch.float32) - 8.0
