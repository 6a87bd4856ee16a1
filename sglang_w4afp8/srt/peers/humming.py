"""``humming-w4a8`` and ``humming-w4a16``: Humming's kernels through SGLang's Humming runner.

Weights are unsigned codes (value plus 8) with BF16 group scales, activations E4M3 with one dynamic
scale a token, or BF16. Kernels are compiled at first use for each range of (token, expert) pairs;
only ranges that the bench reaches are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.peers.marlin import offset_words
from sglang_w4afp8.srt.peers.process import enter_single_rank, missing


class _Humming:
    """Both modes; ``activation`` None is BF16."""

    name: str
    activation: str | None
    tolerance: float

    def why_not(self, problem: MoEProblem) -> str | None:
        """Only what an import says; its own checks speak at preparation."""
        return missing("humming.layer") or missing("sglang.srt.layers.moe.moe_runner.humming")

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Callable[..., torch.Tensor]:
        """Humming's own order of weights and scales, padded as SGLang pads."""
        enter_single_rank()
        from humming.config import GemmType
        from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.humming import (
            HummingMoeQuantInfo,
            HummingRunnerCore,
            HummingRunnerInput,
        )

        layer = self.layer(problem, weights)
        core = HummingRunnerCore(
            MoeRunnerConfig(
                num_experts=all_experts,
                num_local_experts=problem.num_experts,
                hidden_size=problem.hidden_size,
                intermediate_size_per_partition=problem.intermediate_size,
                top_k=problem.top_k,
                params_dtype=torch.bfloat16,
            )
        )
        core.layer = layer
        configs = core.get_humming_gemm_configs(GemmType.INDEXED)
        for projection in ("w13", "w2"):
            reached = [
                entry
                for entry in configs[f"{projection}_tuning_config"]
                if entry[0] < most_tokens * problem.top_k
            ]
            configs[f"{projection}_tuning_config"] = reached
            configs[f"{projection}_tuning_config_str"] = json.dumps(reached)
        info = HummingMoeQuantInfo(layer=layer)

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            given = HummingRunnerInput(x, topk_weights, topk_ids, GemmType.INDEXED)
            return core.run(given, info, {}).hidden_states

        return run

    def layer(self, problem: MoEProblem, weights: MoEWeights, transform: bool = True) -> Any:
        """The module that holds Humming's parameters and their description.

        Args:
            problem: the sizes.
            weights: in checkpoint order.
            transform: bring weights into the kernels' order, which needs a GPU.
        """
        from humming.layer import HummingMethod
        from humming.schema import HummingInputSchema, HummingWeightSchema

        layer = torch.nn.Module()
        layer.params_dtype = torch.bfloat16
        layer.hidden_size = problem.hidden_size
        layer.intermediate_size_per_partition = problem.intermediate_size
        locks = torch.zeros(1024, dtype=torch.int32, device=weights.w13.device)
        layer.register_buffer("locks", locks)
        inner, hidden = problem.intermediate_size, problem.hidden_size
        for name, packed, scale, rows, k, group in (
            ("w13", weights.w13, weights.w13_scale, 2 * inner, hidden, weights.w13_group_size),
            ("w2", weights.w2, weights.w2_scale, hidden, inner, weights.w2_group_size),
        ):
            words = torch.nn.Parameter(offset_words(packed), requires_grad=False)
            setattr(layer, f"{name}_weight", words)
            factors = torch.nn.Parameter(scale.to(torch.bfloat16), requires_grad=False)
            setattr(layer, f"{name}_weight_scale", factors)
            HummingMethod.prepare_layer_meta(
                layer=layer,
                shape_n=rows,
                shape_k=k,
                weight_schema=HummingWeightSchema(b_dtype="uint4", weight_scale_group_size=group),
                input_schema=HummingInputSchema(a_dtype=self.activation),
                num_experts=problem.num_experts,
                pad_n_to_multiple=256,
                pad_k_to_multiple=128,
                torch_dtype=torch.bfloat16,
                sublayer_name=name,
            )
            if transform:
                HummingMethod.transform_humming_layer(layer, sublayer_name=name)
        return layer


class HummingW4A8(_Humming):
    """E4M3 activations, one dynamic scale a token."""

    name = "humming-w4a8"
    activation = "float8e4m3"
    # Gate and up are rounded to BF16 before the product, as in sglang-cutlass, and so is the
    # product before it becomes FP8. One token is the worst: nothing averages out.
    tolerance = 4e-2

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """It knows no static scale."""
        return ActivationScheme.DYNAMIC_PER_TOKEN


class HummingW4A16(_Humming):
    """BF16 activations."""

    name = "humming-w4a16"
    activation = None
    tolerance = 1e-2

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """Activations are not quantised."""
        return ActivationScheme.NONE
