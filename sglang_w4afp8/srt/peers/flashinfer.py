"""``flashinfer-w4a8``: FlashInfer's CUTLASS fused MoE in its INT4 × FP8 mode for sm_90.

FlashInfer compiles the module at first use, which takes far longer than a bench; it runs only where
that has been done, or where FlashInfer's own package of compiled modules is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.cutlass import KERNEL_GROUP, interleave_scales
from sglang_w4afp8.srt.peers.process import missing


def up_first(rows: torch.Tensor) -> torch.Tensor:
    """Gate rows then up rows to up rows then gate rows: ``(E, 2N, …)``."""
    gate, up = rows.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


class FlashInferW4A8:
    """``cutlass_fused_moe`` with packed weights and group scales."""

    name = "flashinfer-w4a8"
    # Activations are multiplied by a BF16 reciprocal instead of divided by the scale, which moves
    # a few codes in a hundred to a neighbour 2⁻⁴ away, and gate and up are rounded to BF16.
    tolerance = 3e-2

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """The same activations."""
        return scheme

    def why_not(self, problem: MoEProblem) -> str | None:
        """Whole groups of 128, static scales, and a compiled module."""
        if problem.columns.size % KERNEL_GROUP or problem.group_size != KERNEL_GROUP:
            return (
                f"{problem.columns.size} columns on this rank in groups of {problem.group_size} "
                f"are no whole groups of {KERNEL_GROUP}"
            )
        if problem.scheme is not ActivationScheme.STATIC:
            return f"static activation scales only, not {problem.scheme}"
        reason = missing("flashinfer.fused_moe")
        if reason is not None:
            return reason
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

        module = gen_cutlass_fused_moe_sm90_module()
        if module.is_compiled:
            return None
        return f"its module {module.name} ({len(module.sources)} CUDA files) is not compiled here"

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """Up before gate, nibbles interleaved for its loads, kernels chosen by its own tuner."""
        from flashinfer.autotuner import autotune
        from flashinfer.fused_moe import (
            cutlass_fused_moe,
            interleave_moe_weights_for_sm90_mixed_gemm,
        )

        experts, inner = problem.num_experts, problem.intermediate_size
        assert weights.w13_input_scale is not None and weights.w2_input_scale is not None
        w13 = interleave_moe_weights_for_sm90_mixed_gemm(
            up_first(weights.w13).view(torch.uint8), "int4"
        )
        w2 = interleave_moe_weights_for_sm90_mixed_gemm(
            weights.w2.contiguous().view(torch.uint8), "int4"
        )
        # Inputs are multiplied by a BF16 number per channel; what it is exactly is undone after.
        first, second = (
            (1.0 / scale).to(torch.bfloat16)
            for scale in (weights.w13_input_scale, weights.w2_input_scale)
        )
        none = first.new_empty(0)
        scales = [
            interleave_scales(up_first(weights.w13_scale).to(torch.bfloat16)),
            interleave_scales(weights.w2_scale.to(torch.bfloat16)),
            first.expand(experts, problem.hidden_size).contiguous(),
            second.view(1, 1, 1).expand(experts, inner, 1).contiguous(),
            none,
            none,
            (1.0 / first.float()).expand(experts).contiguous(),
            (1.0 / second.float()).expand(experts).contiguous(),
        ]

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            output = torch.empty_like(x)
            cutlass_fused_moe(
                x,
                topk_ids,
                topk_weights,
                w13,
                w2,
                torch.bfloat16,
                quant_scales=scales,
                output=output,
                ep_size=all_experts // experts,
                use_w4_group_scaling=True,
                use_packed_weights=True,
                tune_max_num_tokens=most_tokens,
            )
            return output

        probe = torch.zeros(
            most_tokens, problem.hidden_size, dtype=torch.bfloat16, device=w13.device
        )
        ids = torch.arange(problem.top_k, dtype=torch.int32, device=w13.device)
        ids = ids.expand(most_tokens, problem.top_k).contiguous()
        with autotune(True):
            run(probe, torch.ones_like(ids, dtype=torch.float32), ids)
        return run
