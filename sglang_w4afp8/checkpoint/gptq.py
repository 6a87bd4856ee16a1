"""GPTQ layout (AutoGPTQ, GPTQModel, AutoRound's ``auto_gptq``), 4 bits.

``qweight`` int32 ``(K/8, N)``: bits 4i … 4i+3 of a word are element 8r + i **along K**, as
q + zero. ``qzeros`` int32 ``(K/g, N/8)`` packed along N; version 1 stores zero − 1, version 2 the
zero itself. ``scales`` ``(K/g, N)`` float16, possibly negative; ``g_idx`` ``(K)``. Symmetric
checkpoints have zero = 8 throughout, and when ``g_idx`` is i // g the codes are W4AFP8's after a
transposition. Only float16 → bfloat16 rounds the scales, by less than 0.01 dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Int4Weight, Read
from sglang_w4afp8.checkpoint.pack_quantized import int4_from_words
from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import unpack_int4


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """int32 ``(R, C)`` words along the last axis to ``(R, 8C)`` values 0…15, float32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xF).flatten(1).to(torch.float32)


def zero_offset(quant: Mapping[str, Any]) -> int:
    """What is to be added to a stored zero point under this ``quantization_config``."""
    return 0 if quant.get("checkpoint_format") == "gptq_v2" else 1


class Gptq:
    """See the module docstring."""

    name = "gptq"

    def matches(self, parts: ExpertParts) -> bool:
        weight = parts.parts.get("qweight")
        return (
            weight is not None
            and weight.dtype == "I32"
            and "scales" in parts.parts
            and parts.quant.get("quant_method") != "awq"
        )

    def shape(self, parts: ExpertParts) -> tuple[int, int]:
        weight, scales = parts.entry("qweight"), parts.entry("scales")
        bits = int(parts.quant.get("bits", 4))
        columns, rows = weight.shape[0] * 8, weight.shape[1]
        if bits != 4 or scales.shape[1] != rows or columns % scales.shape[0]:
            raise CheckpointError(
                f"{parts.prefix}: qweight {list(weight.shape)}, scales {list(scales.shape)}, "
                f"{bits} bits",
                "4-bit GPTQ has qweight (K/8, N) and scales (K/g, N)",
                ["download the shard again"],
            )
        return rows, columns

    def _source_group(self, parts: ExpertParts) -> int:
        return self.shape(parts)[1] // parts.entry("scales").shape[0]

    def group_size(self, parts: ExpertParts) -> int | None:
        return None if self.inexact(parts) else self._source_group(parts)

    def inexact(self, parts: ExpertParts) -> str | None:
        if parts.quant.get("desc_act"):
            return "desc_act permutes the groups, so they are not contiguous along K"
        if parts.quant.get("sym") is False:
            return "the weights are asymmetric: q − zero point spans −15…15, more than four bits"
        return None

    def load(self, parts: ExpertParts, read: Read) -> FloatWeight | Int4Weight:
        rows, columns = self.shape(parts)
        group = self._source_group(parts)
        scales = read(parts.entry("scales")).t().contiguous()  # (N, K/g)
        words = read(parts.entry("qweight")).t()  # (N, K/8)
        zeros = None
        if "qzeros" in parts.parts:
            zeros = unpack_words(read(parts.entry("qzeros"))) + zero_offset(parts.quant)
            zeros = zeros[:, :rows].t()  # (N, K/g)
        index = torch.arange(columns) // group
        if "g_idx" in parts.parts:
            stored = read(parts.entry("g_idx")).to(torch.int64)
            if stored.numel() == columns:
                index = stored
        if self.inexact(parts) is None:
            # The config promises symmetry and order; the data must keep the promise.
            if zeros is not None and bool((zeros != 8).any()):
                raise self._broken(parts, "qzeros hold other values than 8")
            if bool((index != torch.arange(columns) // group).any()):
                raise self._broken(parts, "g_idx is not i // group_size")
            return Int4Weight(int4_from_words(words), scales.to(torch.bfloat16), group)
        codes = unpack_int4(int4_from_words(words), torch.float32) + 8.0
        offset = torch.full((rows, columns // group), 8.0) if zeros is None else zeros
        return FloatWeight((codes - offset[:, index]) * scales.to(torch.float32)[:, index])

    def _broken(self, parts: ExpertParts, found: str) -> CheckpointError:
        return CheckpointError(
            f"{parts.prefix}: {found}",
            "the config says symmetric and unpermuted, the tensors do not",
            [
                'set "sym": false (or "desc_act": true) in the quantization_config of the source, '
                "then sglang-w4afp8 convert SRC DST --requantize",
                "convert from the BF16 or FP8 checkpoint instead",
            ],
        )
