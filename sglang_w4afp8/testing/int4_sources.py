"""Symmetric INT4 experts in the layouts of compressed-tensors and GPTQ, for tests of importing.

Packed here by plain loops over shifts, independent of the readers in ``checkpoint/``.
"""

from __future__ import annotations

from typing import Any

import torch

_SPARED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.gate$"]


def _codes(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes −8…7 ``(N, K)`` int32 and absmax scales ``(N, K/group)`` float32."""
    groups = weight.view(weight.shape[0], -1, group)
    scale = (groups.abs().amax(dim=-1) / 7.5).clamp(min=1e-8)
    codes = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
    return codes.view(weight.shape).to(torch.int32), scale


def _words(values: torch.Tensor) -> torch.Tensor:
    """``(R, C)`` values 0…15 to ``(R, C/8)`` int32, the first in the lowest bits."""
    packed = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        packed |= values[:, place::8].to(torch.int64) << (4 * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def to_pack_quantized(prefix: str, weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """compressed-tensors ``pack-quantized`` tensors of an ``(N, K)`` float32 matrix."""
    codes, scale = _codes(weight, group)
    return {
        f"{prefix}.weight_packed": _words(codes + 8),
        f"{prefix}.weight_scale": scale.to(torch.bfloat16),
        f"{prefix}.weight_shape": torch.tensor(weight.shape),
    }


def to_gptq(prefix: str, weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """GPTQ (version 1) tensors of an ``(N, K)`` float32 matrix."""
    codes, scale = _codes(weight, group)
    rows, columns = weight.shape
    return {
        f"{prefix}.qweight": _words(codes + 8).t().contiguous(),
        f"{prefix}.scales": scale.t().contiguous().to(torch.float16),
        f"{prefix}.qzeros": torch.full(
            (columns // group, rows // 8), 0x77777777, dtype=torch.int32
        ),
        f"{prefix}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def pack_config(group: int) -> dict[str, Any]:
    """``quantization_config`` in the style of Kimi-K2's INT4 checkpoints."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(_SPARED),
    }


def gptq_config(group: int) -> dict[str, Any]:
    """``quantization_config`` of a GPTQModel export whose linears outside the experts are BF16."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "dynamic": {"-:.*self_attn.*": {}, "-:.*shared_experts.*": {}},
    }
