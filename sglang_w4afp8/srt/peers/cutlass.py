"""``sglang-cutlass``: the INT4 × FP8 grouped GEMM of sglang-kernel with SGLang's glue around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.cutlass import KERNEL_GROUP, CutlassBackend
from sglang_w4afp8.srt.peers.process import enter_single_rank, missing


class SglangCutlass:
    """``cutlass_w4a8_moe``, what SGLang's own ``w4afp8`` method runs."""

    name = "sglang-cutlass"
    # It rounds gate and up to BF16 before the product: 2⁻⁸ moves one FP8 code in sixteen by a step.
    tolerance = 2.5e-2

    def __init__(self) -> None:
        self._backend = CutlassBackend()

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """The same activations."""
        return scheme

    def why_not(self, problem: MoEProblem) -> str | None:
        """What the backend says; SGLang itself cannot cut inside a group."""
        if problem.columns.size % KERNEL_GROUP or not problem.columns.is_aligned:
            return (
                f"{problem.columns.size} columns on this rank are no whole groups of {KERNEL_GROUP}"
            )
        return self._backend.supports(problem) or missing("sglang.srt.layers.moe.cutlass_w4a8_moe")

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """Interleaved scales; the weights stay as they are."""
        enter_single_rank()
        from sglang.srt.runtime_context import get_parallel

        ready = self._backend.prepare(problem, weights)
        expert_parallel = all_experts > problem.num_experts

        def layout() -> Any:
            # SGLang looks for the experts of other ranks only where experts are distributed.
            if expert_parallel:
                return get_parallel().override(moe_ep_size=all_experts // problem.num_experts)
            return nullcontext()

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            with layout():
                return self._backend.run(problem, ready, x, topk_weights, topk_ids, 1.0)

        return run
