"""The kernels that ``bench moe`` times side by side. One that cannot run says why.

A provider gets weights in checkpoint order, makes of them what it wants, and runs a layer. Ours is
a backend of the registry like any other; the peers are called as SGLang calls them and are loaded
by name, since only ``srt/`` may import SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Protocol

import torch

from sglang_w4afp8.kernels.hopper.backend import HopperBackend, layer_of
from sglang_w4afp8.kernels.hopper.plan import plan, takes_prefill
from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.bench_moe import private_copy

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(M, K)`` bfloat16, ``(M, top_k)`` float32, ``(M, top_k)`` int32 to ``(M, K)`` bfloat16."""


class Provider(Protocol):
    """One row's kernel.

    Attributes:
        name: as in results.
        tolerance: relative L2 error against the oracle above which it counts as wrong.
    """

    name: str
    tolerance: float

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """How the oracle quantises activations for it, when the layer's scheme is ``scheme``."""
        ...

    def why_not(self, problem: MoEProblem) -> str | None:
        """The reason for a row without numbers, or None."""
        ...

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Run:
        """The layer over weights in the provider's own order.

        Args:
            problem: this rank's layer.
            weights: in checkpoint order; not changed.
            all_experts: of the model, more than the rank's under expert parallelism.
            most_tokens: the largest M that will be asked for.
        """
        ...


class Ours:
    """The ``hopper`` backend."""

    name = "ours"
    # BF16 intermediates give 2e-3; the rest are FP8 codes on the other side of a rounding boundary.
    tolerance = 1e-2

    def __init__(self) -> None:
        self._backend = HopperBackend()

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        """The same activations."""
        return scheme

    def why_not(self, problem: MoEProblem) -> str | None:
        """What the backend says."""
        return self._backend.supports(problem)

    def prepare(
        self, problem: MoEProblem, weights: MoEWeights, all_experts: int, most_tokens: int
    ) -> Run:
        """Stage order."""
        ready = self._backend.prepare(problem, private_copy(weights))
        self._layer = layer_of(
            ready.w13, ready.w2, ready.w13_scale, ready.w2_scale, problem.top_k,
            ready.w13.dtype is torch.uint8, problem.scheme is not ActivationScheme.STATIC,
            ready.state.limits,
        )  # fmt: skip

        def run(
            x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            return self._backend.run(problem, ready, x, topk_weights, topk_ids, 1.0)

        return run

    def path(self, tokens: int) -> str:
        """Which of the backend's paths runs a call of the layer prepared last."""
        sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        prefill = takes_prefill(self._layer, tokens)
        return "prefill" if prefill else plan(self._layer, tokens, sms).path


_PEERS = "sglang_w4afp8.srt.peers"
PROVIDERS: dict[str, str] = {
    # The least likely to break the process first: a CUDA error that sticks ends the run.
    "ours": f"{__name__}:Ours",
    "sglang-cutlass": f"{_PEERS}.cutlass:SglangCutlass",
    "marlin-w4a16": f"{_PEERS}.marlin:MarlinW4A16",
    "sglang-fp8-triton": f"{_PEERS}.fp8:SglangFp8Triton",
    "humming-w4a16": f"{_PEERS}.humming:HummingW4A16",
    "humming-w4a8": f"{_PEERS}.humming:HummingW4A8",
    "deepgemm-fp8": f"{_PEERS}.fp8:DeepGemmFp8",
    "flashinfer-w4a8": f"{_PEERS}.flashinfer:FlashInferW4A8",
}


def providers(names: Iterable[str] | None = None) -> list[Provider]:
    """Those of ``names``, or all, in the order in which they are to run."""
    wanted = set(PROVIDERS if names is None else names)
    found = []
    for name, place in PROVIDERS.items():
        if name in wanted:
            module, _, kind = place.partition(":")
            found.append(getattr(import_module(module), kind)())
    return found
