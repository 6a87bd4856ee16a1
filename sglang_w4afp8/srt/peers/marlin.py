"""``marlin-w4a16``: SGLang's Marlin MoE, INT4 weights and BF16 activations."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.peers.process import enter_single_rank, missing


def gptq_words(packed: torch.Tensor) -> torch.Tensor:
    """INT4 codes as GPTQ packs them, which is what Marlin's repacking reads.

    Args:
        packed: ``(E, rows, K/2)`` int8, two's complement nibbles, even columns low.

    Returns:
        ``(E, K/8, rows)`` int32: eight codes plus 8 along K in a word, the first in the low bits.
    """
    # Flipping the sign bit of a two's complement nibble adds 8.
    return offset_words(packed).transpose(1, 2).contiguous()


def offset_words(packed: torch.Tensor) -> torch.Tensor:
    """Codes plus 8 in words of eight: ``(E, rows, K/2)`` int8 to ``(E, rows, K/8)`` int32."""
    return packed.view(torch.uint8).bitwise_xor(0x88).view(torch.int32)


REPACK = (
    "sglang.jit_kernel.gptq_marlin_repack",
    "sglang.kernels.ops.quantization.gptq_marlin_repack",
)
"""Where SGLang 0.5.16 and 0.5.23 keep it."""


def repack_module() -> Any:
    """The module that has ``gptq_marlin_repack``.

    Raises:
        ImportError: neither place has it.
    """
    for place in REPACK:
        try:
            return import_module(place)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"none of {', '.join(REPACK)}")


class MarlinW4A16:
    """``fused_marlin_moe`` as SGLang's Marlin runner calls it."""

    name = "marlin-w4a16"
    # BF16 scales times INT4 is exact in FP32, but gate and up, their product, pairs' results and
    # the sum over experts are BF16, and SGLang has Marlin add up parts of K by BF16 atomics on
    # Hopper: for one token, which shares its experts with nobody, 8e-3 with 256 columns on a rank
    # and 1.3e-2 with 64 (benchmarks/results). With more tokens it is 6e-3.
    tolerance = 2e-2

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """Activations are not quantised."""
        return ActivationScheme.NONE

    def why_not(self, problem: MoEProblem) -> str | None:
        """Tiles of 64 along K."""
        if problem.intermediate_size % 64:
            return f"{problem.intermediate_size} columns on this rank are no multiple of 64"
        return missing("sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe")

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """Marlin's own order of weights and scales."""
        enter_single_rank()
        from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe
        from sglang.srt.layers.quantization.marlin_utils import marlin_make_workspace

        inner, hidden = problem.intermediate_size, problem.hidden_size
        w13, w13_scale = _repack(
            weights.w13, weights.w13_scale, hidden, 2 * inner, weights.w13_group_size
        )
        w2, w2_scale = _repack(weights.w2, weights.w2_scale, inner, hidden, weights.w2_group_size)
        # Its presence alone says that some experts are elsewhere.
        elsewhere = w13.new_empty(0) if all_experts > problem.num_experts else None

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            return fused_marlin_moe(
                hidden_states=x,
                w1=w13,
                w2=w2,
                w1_scale=w13_scale,
                w2_scale=w2_scale,
                gating_output=x,  # only its length is looked at
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                expert_map=elsewhere,
                workspace=marlin_make_workspace(x.device, max_blocks_per_sm=4),
                num_bits=4,
            )

        return run


def _repack(
    packed: torch.Tensor, scales: torch.Tensor, k: int, rows: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales

    repack = repack_module().gptq_marlin_repack
    no_order = torch.empty(0, dtype=torch.int32, device=packed.device)
    words = torch.stack([repack(expert, no_order, k, rows, 4) for expert in gptq_words(packed)])
    by_group = scales.to(torch.bfloat16).transpose(1, 2).contiguous()
    return words, marlin_moe_permute_scales(by_group, k, rows, group)
