"""The FP8 peers: ``sglang-fp8-triton`` and ``deepgemm-fp8``.

Both get the dequantised INT4 weights rounded to E4M3 in square blocks, as an FP8 checkpoint of the
same model has them, and quantise activations to E4M3 in groups of a token. They read twice the
weight bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.quantize.fp8 import quantize_fp8_block
from sglang_w4afp8.reference import dequantize_int4
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.peers.process import enter_single_rank, missing

# E4M3's three bits of mantissa leave 2.6 % rms in each of weight and activation, so 3.7 % in gate
# and in up, about 5.5 % in their product, and 6.6 % with down's own two roundings.
FP8_TOLERANCE = 0.1


def fp8_experts(
    packed: torch.Tensor, scales: torch.Tensor, group: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4 experts as block-FP8.

    Args:
        packed: ``(E, rows, K/2)`` int8.
        scales: ``(E, rows, K/group)``.
        group: codes per scale.
        block: edge of an FP8 block; divides rows and K.

    Returns:
        ``(E, rows, K)`` float8_e4m3fn and ``(E, rows/block, K/block)`` float32.
    """
    experts, rows, half = packed.shape
    size = (experts, rows, half * 2)
    weight = torch.empty(size, dtype=torch.float8_e4m3fn, device=packed.device)
    factors = torch.empty(
        experts, rows // block, 2 * half // block, dtype=torch.float32, device=packed.device
    )
    for expert in range(experts):
        values = dequantize_int4(packed[expert], scales[expert], group, torch.float32)
        weight[expert], factors[expert] = quantize_fp8_block(values, (block, block))
    return weight, factors


class _Fp8:
    """What both share."""

    tolerance = FP8_TOLERANCE

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """The layer without any rounding of activations: theirs has groups that no scheme has."""
        return ActivationScheme.NONE


class SglangFp8Triton(_Fp8):
    """SGLang's Triton ``fused_experts`` with FP8 blocks of 128, or 64 where 128 does not divide."""

    name = "sglang-fp8-triton"

    def why_not(self, problem: MoEProblem) -> str | None:
        """Whole blocks only."""
        if problem.intermediate_size % 64:
            return f"{problem.intermediate_size} columns on this rank are no whole blocks of 64"
        return missing("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """FP8 weights with square blocks."""
        enter_single_rank()
        from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        block = 128 if problem.intermediate_size % 128 == 0 else 64
        w13, w13_scale = fp8_experts(weights.w13, weights.w13_scale, weights.w13_group_size, block)
        w2, w2_scale = fp8_experts(weights.w2, weights.w2_scale, weights.w2_group_size, block)
        config = MoeRunnerConfig(
            num_experts=all_experts,
            num_local_experts=problem.num_experts,
            top_k=problem.top_k,
            inplace=False,
        )

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            return fused_experts(
                x,
                w13,
                w2,
                StandardTopKOutput(topk_weights, topk_ids, x),
                config,
                use_fp8_w8a8=True,
                w1_scale=w13_scale,
                w2_scale=w2_scale,
                block_shape=[block, block],
            )

        return run


class DeepGemmFp8(_Fp8):
    """DeepGEMM's masked grouped GEMM with SGLang's permutation and activation around it."""

    name = "deepgemm-fp8"

    def why_not(self, problem: MoEProblem) -> str | None:
        """Blocks of 128, and SGLang's own switch."""
        if problem.intermediate_size % 128:
            return f"{problem.intermediate_size} columns on this rank are no whole blocks of 128"
        switch = "SGLANG_ENABLE_JIT_DEEPGEMM"
        if os.environ.get(switch, "1").lower() in ("0", "false"):
            return f"{switch}={os.environ[switch]}"
        return missing("deep_gemm") or missing("sglang.srt.layers.moe.moe_runner.deep_gemm")

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """FP8 weights with blocks of 128 × 128."""
        enter_single_rank()
        from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.deep_gemm import (
            DeepGemmMoeQuantInfo,
            DeepGemmRunnerCore,
            post_permute_deep_gemm_to_standard,
            pre_permute_standard_to_deep_gemm,
        )
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        w13, w13_scale = fp8_experts(weights.w13, weights.w13_scale, weights.w13_group_size, 128)
        w2, w2_scale = fp8_experts(weights.w2, weights.w2_scale, weights.w2_group_size, 128)
        config = MoeRunnerConfig(
            num_experts=all_experts,
            num_local_experts=problem.num_experts,
            top_k=problem.top_k,
        )
        core = DeepGemmRunnerCore(config)
        info = DeepGemmMoeQuantInfo(
            w13, w2, True, w13_scale=w13_scale, w2_scale=w2_scale, block_shape=[128, 128]
        )

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            # It empties the tensor object that it was given, so it gets one of its own.
            own = x.view(x.shape)
            dispatched = StandardDispatchOutput(
                own, None, StandardTopKOutput(topk_weights, topk_ids, x)
            )
            state: dict[str, object] = {}
            given = pre_permute_standard_to_deep_gemm(dispatched, info, config, state)
            done = core.run(given, info, state)
            return post_permute_deep_gemm_to_standard(done, info, config, state).hidden_states

        return run
