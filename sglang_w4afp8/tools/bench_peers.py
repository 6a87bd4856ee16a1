"""The kernels that ``bench moe`` times side by side. One that cannot run says why.

A provider gets weights in checkpoint order, makes of them what it wants, and runs a layer. Ours is
a backend of the registry like any other; the peers are called as SGLang calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sglang_w4afp8.kernels.hopper.backend import HopperBackend
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.bench_moe import Call, Shape, private_copy

Run = Callable[[Call], torch.Tensor]


class Provider(Protocol):
    """One row's kernel."""

    name: str

    def why_not(self, shape: Shape, scheme: ActivationScheme) -> str | None:
        """The reason for a row without numbers, or None."""
        ...

    def prepare(self, shape: Shape, scheme: ActivationScheme, weights: MoEWeights) -> Run:
        """The layer over a copy of ``weights`` in the provider's own order."""
        ...


class Ours:
    """The ``hopper`` backend."""

    name = "ours"

    def __init__(self) -> None:
        self._backend = HopperBackend()

    def why_not(self, shape: Shape, scheme: ActivationScheme) -> str | None:
        """What the backend says."""
        return self._backend.supports(shape.problem(scheme, torch.device("cuda")))

    def prepare(self, shape: Shape, scheme: ActivationScheme, weights: MoEWeights) -> Run:
        """Stage order."""
        problem = shape.problem(scheme, torch.device("cuda"))
        ready = self._backend.prepare(problem, private_copy(weights))

        def run(call: Call) -> torch.Tensor:
            return self._backend.run(problem, ready, call.x, call.topk_weights, call.topk_ids, 1.0)

        return run


class Absent:
    """A peer without a runner here yet: a row that says so."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, shape: Shape, scheme: ActivationScheme) -> str | None:
        """Always a reason."""
        return "no runner for it in this bench yet"

    def prepare(self, shape: Shape, scheme: ActivationScheme, weights: MoEWeights) -> Run:
        """Never called."""
        raise NotImplementedError(self.name)


def providers() -> list[Provider]:
    """All, ours first."""
    peers = (
        "sglang-cutlass",
        "humming-w4a8",
        "humming-w4a16",
        "sglang-fp8-triton",
        "deepgemm-fp8",
        "flashinfer-w4a8",
        "marlin-w4a16",
    )
    return [Ours(), *(Absent(name) for name in peers)]
