"""The ``torch`` backend: the reference in float32, on any device, at any shape.

It is slow and always right: what every other backend is compared with, what runs without a GPU, and
what a card without a faster kernel gets. In a CUDA graph it visits all experts, because shapes that
depend on the routing cannot be captured.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.kernels.base import MoEProblem, MoEWeights
from sglang_w4afp8.reference import masked_reference, moe_reference


class TorchBackend:
    """See the module."""

    name = "torch"

    def supports(self, problem: MoEProblem) -> str | None:
        """Everything but activations other than SiLU."""
        if problem.activation != "silu":
            return f"activation {problem.activation!r} is not implemented (silu is)"
        return None

    def prepare(self, problem: MoEProblem, weights: MoEWeights) -> MoEWeights:
        """Keeps checkpoint order."""
        return weights

    def run(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        routed_scaling_factor: float,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`sglang_w4afp8.kernels.base.MoEBackend.run`."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return moe_reference(
            x,
            weights,
            topk_weights,
            topk_ids,
            scheme=problem.scheme,
            x_scale=x_scale,
            routed_scaling_factor=routed_scaling_factor,
            apply_router_weight_on_input=problem.apply_router_weight_on_input,
            compute_dtype=torch.float32,
            visit_all_experts=capturing,
        ).to(x.dtype if x_scale is None else problem.dtype)

    def run_masked(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        masked_m: torch.Tensor,
        expected_m: int,
    ) -> torch.Tensor:
        """See :meth:`sglang_w4afp8.kernels.base.MoEBackend.run_masked`."""
        return masked_reference(
            rows,
            weights,
            masked_m,
            scheme=problem.scheme,
            row_scale=row_scale,
            compute_dtype=torch.float32,
        ).to(rows.dtype if row_scale is None else problem.dtype)
