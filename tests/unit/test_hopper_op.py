"""The Hopper layer as torch.compile sees it: traced without a GPU, through the op's fake."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sglang_w4afp8.kernels.hopper import backend, launch
from sglang_w4afp8.kernels.hopper.plan import UNLIMITED, Layer, Limits
from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme


class Block(torch.nn.Module):
    """Work around one expert layer, as in a decoder block."""

    def __init__(
        self,
        hidden: int,
        full_inner: int,
        scheme: ActivationScheme,
        limits: Limits = Limits(8, 256, UNLIMITED),  # noqa: B008
    ) -> None:
        super().__init__()
        columns = AxisShard.even(full_inner, 128, 0, 8)
        self.problem = MoEProblem(4, hidden, columns, 128, 2, scheme, Device("cpu"))
        g = torch.Generator().manual_seed(0)
        inner, group = columns.size, columns.local_group

        def codes(rows: int, k: int) -> torch.Tensor:
            return pack_int4(torch.randint(-7, 8, (4, rows, k), generator=g))

        static = torch.ones(1) if scheme is ActivationScheme.STATIC else None
        weights = MoEWeights(
            codes(2 * inner, hidden),
            torch.ones(4, 2 * inner, hidden // 128).bfloat16(),
            codes(hidden, inner),
            torch.ones(4, hidden, inner // group).bfloat16(),
            128,
            group,
            static,
            static,
        )
        self.backend = backend.HopperBackend()
        state = backend.State(torch.zeros(16, dtype=torch.int32), limits)
        self.ready = self.backend.prepare(self.problem, weights).replaced(state=state)

    def forward(self, x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``x`` plus the layer's output."""
        return x + self.backend.run(self.problem, self.ready, x * 0.5, route, ids, 2.5)


@pytest.mark.parametrize("full_inner", [2048, 768])
@pytest.mark.parametrize("scheme", ["static", "dynamic_per_token"])
def test_one_graph_with_one_node_of_ours(full_inner: int, scheme: str) -> None:
    block = Block(256, full_inner, ActivationScheme(scheme))
    inputs = (
        torch.zeros(6, 256, dtype=torch.bfloat16),
        torch.zeros(6, 2),
        torch.zeros(6, 2, dtype=torch.int32),
    )
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens})
    program = torch.export.export(block, inputs, dynamic_shapes=shapes, strict=True)
    ours = [node for node in program.graph.nodes if "hopper_moe" in str(node.target)]
    assert len(ours) == 1
    made = ours[0].meta["val"]
    assert made.shape[1] == 256 and made.dtype == torch.bfloat16
    assert isinstance(made.shape[0], torch.SymInt), "one graph for every number of tokens"


def test_the_calls_paths_are_the_prepared_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch.compile, with two layers whose limits differ in one graph."""
    seen: list[Limits | None] = []

    def run(layer: Layer, tensors: launch.Tensors, factor: float) -> torch.Tensor:
        seen.append(layer.limits)
        return torch.zeros_like(tensors.x)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    blocks = [
        Block(256, 2048, ActivationScheme.STATIC, limits)
        for limits in (Limits(8, 64, UNLIMITED), Limits(3, 1, 700))
    ]

    def step(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = block(x, route, ids)
        return x

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (6, 9):
        ids = torch.zeros(tokens, 2, dtype=torch.int32)
        compiled(torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, 2), ids)
    assert seen == [Limits(8, 64, UNLIMITED), Limits(3, 1, 700)] * 2
