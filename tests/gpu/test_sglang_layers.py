"""SGLang's real layers on a GPU: every backend that takes the shard, summed over all ranks.

The widths are those that SGLang's own method gets wrong; the judge is the float64 oracle of the
whole layer. Needs SGLang and, for the CUTLASS backend, a Hopper card.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sglang_w4afp8.kernels.registry import BACKENDS, get_backend
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sglang,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PREFIX = cases.EXPERTS_PREFIX
EXPERTS, HIDDEN, TOP_K = 8, 1024, 4
SCALE = 0.02
# Partial sums are BF16 per rank, and FP8 codes differ where a sum falls on the other side of a
# rounding boundary. sglang-kernel rounds gate and up to BF16 in between: an error of 2⁻⁸ in a value
# whose FP8 neighbours are 2⁻⁴ apart moves one code in sixteen by one step, √(1/16) · 2⁻⁴ ≈ 1.6 %.
TOLERANCE = {"cutlass": 2.5e-2}


# What a backend may refuse on a Hopper card; anything else is a fault, not a reason to skip.
REFUSED = {
    "hopper": ("dynamic_per_tensor activations", "not a multiple of 32"),
    "cutlass": ("one activation scale per call",),
    "torch": (),
}


def skip_if_refused(backend: str, error: Exception) -> None:
    """Skip for a reason of :data:`REFUSED`, or on a card that is no Hopper; else raise."""
    expected = any(text in str(error) for text in REFUSED[backend])
    if not expected and torch.cuda.get_device_capability() == (9, 0):
        raise error
    pytest.skip(f"{backend} does not take it: {error}")


@pytest.fixture(autouse=True, scope="module")
def needs_sglang() -> None:
    pytest.importorskip("sglang")


def expert_tensors(
    intermediate: int, scales: cases.ScaleRange = cases.INT4_UNIT
) -> dict[str, torch.Tensor]:
    shape = cases.ExpertShape(EXPERTS, HIDDEN, intermediate)
    return cases.expert_tensors(shape, PREFIX, seed=intermediate, scales=scales, input_scale=SCALE)


def oracle(
    tensors: dict[str, torch.Tensor],
    scheme: ActivationScheme,
    routing: cases.Routing,
    intermediate: int,
    tp: int,
) -> torch.Tensor:
    """Sum over ranks of the float64 oracle: a rank's FP8 scale is that of its own columns."""
    from sglang_w4afp8.sharding import ExpertShard

    whole = cases.whole_weights({name: tensor.cuda() for name, tensor in tensors.items()}, PREFIX)
    total = torch.zeros(routing.x.shape[0], HIDDEN, dtype=torch.float64, device="cuda")
    for rank in range(tp):
        shard = ExpertShard.plan(HIDDEN, intermediate, 128, rank, tp)
        rows = shard.w13_rows

        def cut(gate_up: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            return torch.cat([half[:, rows] for half in gate_up.chunk(2, dim=1)], dim=1)

        local = whole.replaced(
            w13=cut(whole.w13),
            w13_scale=cut(whole.w13_scale),
            w2=whole.w2[:, :, shard.w2_bytes],
            w2_scale=whole.w2_scale[:, :, list(shard.w2_scale_columns)],
            w2_group_size=shard.w2_group_size,
        )
        x, weights, ids = routing
        total += moe_reference(x, local, weights, ids, scheme=scheme)
    return total


def routing(tokens: int) -> cases.Routing:
    shape = cases.ExpertShape(EXPERTS, HIDDEN, 128)
    made = cases.random_routing(tokens, shape, TOP_K, dtype=torch.bfloat16, seed=tokens)
    return made.to("cuda")


def build(tensors: dict[str, torch.Tensor], intermediate: int, **fields: Any) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    with torch.device("cuda"):
        return load_experts(
            ShardedW4AFp8Config(QuantSpec(**fields)),
            tensors,
            PREFIX,
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=intermediate,
            top_k=TOP_K,
            dtype=torch.bfloat16,
        )


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(
    ("intermediate", "tp"),
    [(2048, 32), (1536, 8), (768, 8), (2560, 8), (1408, 8), (2048, 8), (2048, 1)],
)
@pytest.mark.parametrize("scheme", ["static", "dynamic_per_tensor", "dynamic_per_token"])
def test_ranks_add_up(
    backend: str, intermediate: int, tp: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_w4afp8.errors import BackendError
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", backend)
    tensors = expert_tensors(intermediate)
    for tokens in (1, 7, 64):
        inputs = routing(tokens)
        total = torch.zeros(tokens, HIDDEN, dtype=torch.float64, device="cuda")
        for rank in range(tp):
            with virtual_rank(rank, tp):
                try:
                    layer = build(tensors, intermediate, moe_activation=ActivationScheme(scheme))
                except BackendError as error:
                    skip_if_refused(backend, error)
                total += run_experts(layer, *inputs).double()
            del layer
        expected = oracle(tensors, ActivationScheme(scheme), inputs, intermediate, tp)
        error = float((total - expected).norm() / expected.norm())
        assert error < TOLERANCE.get(backend, 8e-3), f"{tokens} tokens: {error:.2e}"


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("intermediate", "tp"), [(1536, 8), (2048, 1)])
def test_negative_scales_and_the_sixteenth_code(
    backend: str, intermediate: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``convert --method mse`` writes: scales of both signs, codes −8…7."""
    from sglang_w4afp8.errors import BackendError
    from sglang_w4afp8.packing import has_minus_eight
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", backend)
    tensors = expert_tensors(intermediate, cases.ScaleRange(0.6, -0.3, per_root_k=True))
    gate = f"{PREFIX}.0.gate_proj.weight"
    assert has_minus_eight(tensors[gate])
    assert float(tensors[f"{gate}_scale_inv"].min()) < 0 < float(tensors[f"{gate}_scale_inv"].max())
    inputs = routing(33)
    total = torch.zeros(33, HIDDEN, dtype=torch.float64, device="cuda")
    for rank in range(tp):
        with virtual_rank(rank, tp):
            try:
                layer = build(tensors, intermediate, moe_activation=ActivationScheme.STATIC)
            except BackendError as error:
                skip_if_refused(backend, error)
            total += run_experts(layer, *inputs).double()
    expected = oracle(tensors, ActivationScheme.STATIC, inputs, intermediate, tp)
    error = float((total - expected).norm() / expected.norm())
    assert error < TOLERANCE.get(backend, 8e-3), f"{error:.2e}"


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_graph_replay_with_changed_routing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.errors import BackendError
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", backend)
    tensors = expert_tensors(1536)
    with virtual_rank(1, 8):
        try:
            layer = build(tensors, 1536)
        except BackendError as error:
            skip_if_refused(backend, error)
        static = routing(16)
        run_experts(layer, *static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_experts(layer, *static)
        for seed in (17, 18):
            fresh = [t[:16] for t in routing(seed)]
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
            graph.replay()
            eager = run_experts(layer, *fresh)
            difference = (captured.double() - eager.double()).norm() / eager.double().norm()
            assert difference < 4e-3
        assert captured.isfinite().all()


def test_reasons_match_reality() -> None:
    """The cutlass backend must be usable on Hopper, or its table is wrong."""
    if torch.cuda.get_device_capability() == (9, 0):
        pytest.importorskip("sgl_kernel")
        assert get_backend("cutlass").name == "cutlass"


@pytest.mark.parametrize(
    ("intermediate", "tp", "block"),
    [(18432, 32, 64), (2048, 32, 64), (1536, 8, 64), (768, 8, 32), (1408, 8, 16), (2048, 8, 128)],
)
def test_fp8_mlp_ranks_add_up(intermediate: int, tp: int, block: int) -> None:
    from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    generator = torch.Generator().manual_seed(intermediate)
    tensors = cases.fp8_mlp_tensors(
        "mlp", HIDDEN, intermediate, seed=generator, scales=cases.FP8_UNIT
    )
    x = torch.randn(5, HIDDEN, generator=generator).bfloat16().cuda()
    expected = cases.fp8_mlp_reference(x, tensors, "mlp")
    total = torch.zeros_like(expected)
    for rank in range(tp):
        with virtual_rank(rank, tp), torch.device("cuda"):
            common = {
                "bias": False,
                "quant_config": ShardedW4AFp8Config(QuantSpec()),
                "params_dtype": torch.bfloat16,
            }
            gate_up = MergedColumnParallelLinear(
                HIDDEN, [intermediate] * 2, prefix="mlp.gate_up_proj", **common
            )
            down = RowParallelLinear(
                intermediate, HIDDEN, prefix="mlp.down_proj", reduce_results=False, **common
            )
            load_linear(gate_up, "mlp.gate_up_proj", tensors)
            load_linear(down, "mlp.down_proj", tensors)
            regrouped = gate_up.quant_method.regrouped
            assert (regrouped.block[0] if regrouped else 128) == block
            halves = gate_up.quant_method.apply(gate_up, x).chunk(2, dim=-1)
            total += down.quant_method.apply(down, F.silu(halves[0]) * halves[1]).double()
    error = float((total - expected).norm() / expected.norm())
    # Both inputs are rounded to E4M3 in groups of at most 128: 2⁻⁴ steps, about 2.6 % rms each.
    assert error < 0.05, f"{error:.3f}"


@pytest.mark.parametrize("low_latency", [False, True], ids=["normal", "low-latency"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("scheme", ["static", "dynamic_per_token"])
@pytest.mark.parametrize("backend", ["hopper", "torch"])
def test_behind_deepep(
    backend: str, scheme: str, fp8: bool, low_latency: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's ``DeepEPMoE`` and dispatcher; DeepEP itself is emulated."""
    from sglang_w4afp8.srt.virtual_deepep import run_through_deepep, virtual_deepep
    from sglang_w4afp8.testing.dispatch import OneBatch, quantize_rows

    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", backend)
    tensors, ranks = expert_tensors(640), 2
    whole = cases.whole_weights({name: tensor.cuda() for name, tensor in tensors.items()}, PREFIX)
    for tokens in (1, 7, 100):
        batch = routing(tokens)
        total = torch.zeros(tokens, HIDDEN, dtype=torch.float64, device="cuda")
        for rank in range(ranks):
            buffer = OneBatch(batch, rank, ranks, EXPERTS // ranks)
            with virtual_deepep(buffer, quantize_rows, rank, ranks):
                layer = build(tensors, 640, moe_activation=ActivationScheme(scheme))
                assert type(layer).__name__ == "DeepEPMoE"
                form = {"dispatcher_output_dtype": "fp8" if fp8 else "bf16"}
                layer.dispatcher.set_quant_config(form)
                total += run_through_deepep(layer, *batch, low_latency=low_latency)
        x, scale = quantize_rows(batch.x) if fp8 else (batch.x, None)
        wanted = moe_reference(
            x, whole, batch.topk_weights, batch.topk_ids, scheme=ActivationScheme(scheme),
            x_scale=scale,
        )  # fmt: skip
        assert float((total - wanted).norm() / wanted.norm()) < 1.2e-2
