"""SGLang's real FusedMoE, loaded as every rank of any layout.

The parts are judged by the float64 oracle of the whole layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = pytest.mark.sglang

PREFIX = cases.EXPERTS_PREFIX
EXPERTS, HIDDEN, TOP_K, TOKENS = 4, 256, 2, 7

# Intermediate size, tp, ep. The first block is what SGLang's own method gets silently wrong.
LAYOUTS = [
    (2048, 32, 1),  # 64 columns a rank: DeepSeek-R1
    (1536, 8, 1),  # 192: Qwen3-235B
    (2560, 8, 1),  # 320: Qwen3-Coder-480B
    (1408, 8, 1),  # 176: GLM-4.5-Air
    (2048, 8, 1),
    (2048, 16, 1),
    (1024, 4, 4),
    (1536, 16, 2),
    (1408, 32, 4),
]


@pytest.fixture(autouse=True)
def weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")


def made(
    intermediate: int, group: int = 128, input_scale: float | None = None
) -> dict[str, torch.Tensor]:
    shape = cases.ExpertShape(EXPERTS, HIDDEN, intermediate, group)
    return cases.expert_tensors(shape, PREFIX, seed=intermediate, input_scale=input_scale)


def routing() -> cases.Routing:
    return cases.random_routing(TOKENS, cases.ExpertShape(EXPERTS, HIDDEN, 128), TOP_K, seed=1)


def config(**fields: Any) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    return ShardedW4AFp8Config(QuantSpec(**fields))


def build(
    tensors: dict[str, torch.Tensor], intermediate: int, quant_config: Any = None, **options: Any
) -> Any:
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    return load_experts(
        quant_config or config(),
        tensors,
        PREFIX,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        top_k=TOP_K,
        **options,
    )


def sum_over_ranks(
    tensors: dict[str, torch.Tensor], intermediate: int, tp: int, ep: int, **fields: Any
) -> torch.Tensor:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    total = torch.zeros(TOKENS, HIDDEN)
    for rank in range(tp):
        with virtual_rank(rank, tp, ep):
            total += run_experts(build(tensors, intermediate, config(**fields)), *routing())
    return total


@pytest.mark.parametrize(("intermediate", "tp", "ep"), LAYOUTS)
def test_ranks_add_up_to_the_oracle(intermediate: int, tp: int, ep: int) -> None:
    tensors = made(intermediate)
    expected = moe_reference(
        *_arguments(tensors), scheme=ActivationScheme.NONE, compute_dtype=torch.float64
    )
    total = sum_over_ranks(tensors, intermediate, tp, ep)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def _arguments(
    tensors: dict[str, torch.Tensor], group: int = 128
) -> tuple[torch.Tensor, MoEWeights, torch.Tensor, torch.Tensor]:
    x, weights, ids = routing()
    return x, cases.whole_weights(tensors, PREFIX, group), weights, ids


@pytest.mark.parametrize("group", [32, 64])
def test_finer_groups(group: int) -> None:
    tensors = made(1408, group)
    expected = moe_reference(*_arguments(tensors, group), scheme=ActivationScheme.NONE)
    total = sum_over_ranks(tensors, 1408, 8, 1, group_size=group)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def test_static_activations_are_the_same_at_every_tp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    tensors = made(1536, input_scale=0.01)
    expected = moe_reference(*_arguments(tensors), scheme=ActivationScheme.STATIC)
    unquantised = moe_reference(*_arguments(tensors), scheme=ActivationScheme.NONE)
    assert (expected - unquantised).abs().max() > 1e-3 * expected.abs().max(), "nothing was rounded"
    for tp in (1, 8):
        total = sum_over_ranks(tensors, 1536, tp, 1)
        # float32 sums may move an intermediate across an FP8 rounding boundary.
        error = (total - expected).norm() / expected.norm()
        assert error < 2e-3, f"tp {tp}: {error:.2e}"


@pytest.mark.parametrize(("intermediate", "tp"), [(2048, 32), (1536, 8), (2560, 8), (1408, 8)])
def test_stock_method_loads_too_few_scales_without_a_word(intermediate: int, tp: int) -> None:
    """What this package is for. When it fails, SGLang has mended it: docs/tensor-parallel.md."""
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    with virtual_rank(1, tp):
        layer = build(
            made(intermediate, input_scale=0.01),
            intermediate,
            W4AFp8Config(),
            dtype=torch.bfloat16,
        )
    columns = intermediate // tp
    held = layer.w2_weight_scale_inv.numel() // (EXPERTS * HIDDEN)
    needed = -(-(2 * columns) // 128) - columns // 128
    assert held == columns // 128 < needed


def test_replicated_experts_get_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """EPLB: a checkpoint expert lives in several slots; the id mapping is SGLang's."""
    from sglang.srt.layers.moe.fused_moe_triton import layer as layer_module

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    class Metadata:
        num_logical_experts = 4

        def logical_to_all_physical(self, layer_id: int, expert: int, *_: Any) -> list[int]:
            return {0: [3, 0], 1: [1, 4], 2: [2], 3: [5]}[expert]

    monkeypatch.setattr(layer_module, "get_global_expert_location_metadata", Metadata)
    tensors = made(512)
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    layers = []
    for rank in range(2):
        with virtual_rank(rank, 2, ep_size=2):
            layers.append(
                load_experts(
                    config(),
                    tensors,
                    PREFIX,
                    num_experts=6,
                    hidden_size=HIDDEN,
                    intermediate_size=512,
                    top_k=TOP_K,
                )
            )
    placed = torch.cat([layer.w2_weight for layer in layers])
    for physical, logical in {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 3}.items():
        assert torch.equal(placed[physical], tensors[f"{PREFIX}.{logical}.down_proj.weight"])


def test_zero_tokens_and_missing_ids() -> None:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    tensors = made(512)
    x, weights, ids = routing()
    with virtual_rank(0, 1):
        layer = build(tensors, 512)
        assert run_experts(layer, x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)
        nothing = run_experts(layer, x, weights, torch.full_like(ids, EXPERTS))
        assert torch.equal(nothing, torch.zeros_like(x))


def test_router_weight_on_input() -> None:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    tensors = made(512)
    x, weights, ids = routing()
    with virtual_rank(0, 1):
        layer = build(tensors, 512, apply_router_weight_on_input=True)
        actual = run_experts(layer, x, weights[:, :1], ids[:, :1])
    expected = moe_reference(
        x * weights[:, :1], cases.whole_weights(tensors), torch.ones(TOKENS, 1), ids[:, :1],
        scheme=ActivationScheme.NONE,
    )  # fmt: skip
    assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


def test_bfloat16_within_its_rounding() -> None:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    tensors = made(1536)
    x, weights, ids = routing()
    expected = moe_reference(
        x.bfloat16(), cases.whole_weights(tensors), weights, ids, scheme=ActivationScheme.NONE
    )
    with virtual_rank(0, 1):
        layer = build(tensors, 1536, dtype=torch.bfloat16)
        actual = run_experts(layer, x.bfloat16(), weights, ids)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


def test_experts_left_unquantised_are_bfloat16() -> None:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    with virtual_rank(0, 1):
        layer = FusedMoE(
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=512,
            layer_id=0,
            top_k=TOP_K,
            params_dtype=torch.bfloat16,
            quant_config=config(ignored_layers=(PREFIX,)),
            prefix=PREFIX,
        )
    assert layer.w13_weight.dtype == torch.bfloat16
    assert "w13_weight_scale_inv" not in dict(layer.named_parameters())


class InPlaceBackend:
    """Reorders within the loaded storage and marks it by dtype, as the Hopper kernels do."""

    name = "in-place"

    def supports(self, problem: Any) -> None:
        return None

    def prepare(self, problem: Any, weights: Any) -> Any:
        weights.w13.view(torch.uint8).bitwise_xor_(0x88)
        return weights.replaced(w13=weights.w13.view(torch.uint8), state="mine")

    def run(self, problem: Any, weights: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        assert weights.w13.dtype is torch.uint8, "the mark was lost"
        assert weights.state == "mine"
        return torch.zeros_like(x)


def test_a_reordered_layer_keeps_its_mark_and_refuses_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_w4afp8.errors import BackendError
    from sglang_w4afp8.srt import moe
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    monkeypatch.setattr(moe, "select", lambda problem: InPlaceBackend())
    tensors = made(512)
    with virtual_rank(0, 1):
        layer = build(tensors, 512)
        run_experts(layer, *routing())
        for parameter in (layer.w13_weight, layer.w2_weight_scale_inv):
            with pytest.raises(BackendError, match="running model"):
                parameter.weight_loader(parameter, torch.zeros(1), "w", shard_id="w1", expert_id=0)


def test_weights_in_checkpoint_order_can_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import load_tensors, run_experts, virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "torch")
    old, new = made(512), made(512)
    for name in new:
        if name.endswith("weight_scale_inv"):
            new[name] = new[name] * 2
    with virtual_rank(0, 1):
        layer = build(old, 512)
        before = run_experts(layer, *routing())
        load_tensors(layer, new, PREFIX)
        layer.quant_method.process_weights_after_loading(layer)
        after = run_experts(layer, *routing())
        fresh = run_experts(build(new, 512), *routing())
    assert torch.equal(after, fresh)
    assert not torch.allclose(after, before)
