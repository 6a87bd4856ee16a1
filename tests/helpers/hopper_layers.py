"""Layers of random weights on the GPU, prepared by the ``hopper`` backend and as they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_w4afp8.kernels.hopper.backend import HopperBackend
from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

STATIC, PER_TOKEN = ActivationScheme.STATIC, ActivationScheme.DYNAMIC_PER_TOKEN
TOLERANCE = 1.2e-2
"""Relative L2 error against the oracle; why so much is said in tests/gpu/test_hopper_moe.py."""


@dataclass(frozen=True)
class Case:
    """A rank's layer.

    Attributes:
        hidden: K of gate and up.
        full_inner: intermediate size of the model.
        tp: ranks that share it.
        group: INT4 codes per scale.
        scheme: of the activations.
        experts: on the rank.
        top_k: experts per token.
        minus_eight: whether codes reach −8.
        dispatched: behind a token dispatcher.
    """

    hidden: int = 1024
    full_inner: int = 2048
    tp: int = 8
    group: int = 128
    scheme: ActivationScheme = STATIC
    experts: int = 16
    top_k: int = 4
    minus_eight: bool = True
    dispatched: bool = False

    @property
    def problem(self) -> MoEProblem:
        """Rank 1's, if there are several."""
        return MoEProblem(
            self.experts,
            self.hidden,
            AxisShard.even(self.full_inner, self.group, min(1, self.tp - 1), self.tp),
            self.group,
            self.top_k,
            self.scheme,
            Device.of(torch.device("cuda")),
            dispatched=self.dispatched,
        )


class Layer:
    """Random weights in both orders.

    Attributes:
        weights: in checkpoint order.
        ready: as the backend prepared a copy of them.

    Args:
        case: sizes.
        seed: of the weights.
        static_scale: of both inputs, where the scheme is static.
    """

    def __init__(self, case: Case, seed: int = 0, static_scale: float = 0.02) -> None:
        self.case, self.problem = case, case.problem
        g = torch.Generator("cuda").manual_seed(seed)
        inner, local = self.problem.intermediate_size, self.problem.w2_group_size
        low = -8 if case.minus_eight else -7

        def codes(rows: int, k: int) -> torch.Tensor:
            size = (case.experts, rows, k)
            return pack_int4(torch.randint(low, 8, size, generator=g, device="cuda"))

        def scales(rows: int, k: int, group: int) -> torch.Tensor:
            size = (case.experts, rows, k // group)
            factor = 0.25 / k**0.5
            return ((torch.rand(size, generator=g, device="cuda") + 0.5) * factor).bfloat16()

        static = torch.tensor([static_scale], device="cuda") if case.scheme is STATIC else None
        self.weights = MoEWeights(
            codes(2 * inner, case.hidden),
            scales(2 * inner, case.hidden, case.group),
            codes(case.hidden, inner),
            scales(case.hidden, inner, local),
            case.group,
            local,
            static,
            None if static is None else static.clone(),
        )
        copy = self.weights.replaced(
            w13=self.weights.w13.clone(),
            w13_scale=self.weights.w13_scale.clone(),
            w2=self.weights.w2.clone(),
            w2_scale=self.weights.w2_scale.clone(),
        )
        self.backend = HopperBackend()
        assert self.backend.supports(self.problem) is None
        self.ready = self.backend.prepare(self.problem, copy)


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2; NaN stays NaN."""
    wanted = wanted.double()
    return float((out.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
