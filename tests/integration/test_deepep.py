"""SGLang's ``DeepEPMoE`` with our method, and with its real dispatcher over an emulated DeepEP.

The DeepEP library itself needs GPUs and is not here: ``Buffer`` is played by ``OneBatch``,
everything between it and the experts is SGLang's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing import cases
from sglang_w4afp8.testing.dispatch import (
    OneBatch,
    dispatch_slots,
    dispatch_tokens,
    quantize_rows,
)

pytestmark = pytest.mark.sglang

PREFIX = cases.EXPERTS_PREFIX
RANKS, LOCAL, TOP_K, TOKENS = 2, 2, 2, 11
GROUPS = (128, 64, 32)
SCALING = 2.5  # the models apply it after combine; here it must have no effect


def shape(group: int) -> cases.ExpertShape:
    # 320 columns are no multiple of 128: SGLang's own method cannot run these experts.
    return cases.ExpertShape(RANKS * LOCAL, 256, 384 if group == 128 else 320, group)


@pytest.fixture(scope="module")
def tensors() -> dict[int, dict[str, torch.Tensor]]:
    return {
        group: cases.expert_tensors(
            shape(group), PREFIX, scales=cases.INT4_UNIT, input_scale=0.02, seed=group
        )
        for group in GROUPS
    }


@pytest.fixture
def batch() -> cases.Routing:
    """Rank 1 has an expert without tokens, and one token has no expert."""
    made = cases.random_routing(TOKENS, shape(128), TOP_K, dtype=torch.bfloat16, seed=3)
    made.topk_ids[made.topk_ids == 2] = -1
    made.topk_ids[5] = -1
    return made


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the method, not the model, applies ``routed_scaling_factor`` to standard layers."""
    from sglang_w4afp8.srt import host

    monkeypatch.setattr(host, "model_scales_routed_output", lambda: False)


@contextmanager
def rank_of(rank: int, batch: cases.Routing) -> Iterator[None]:
    from sglang_w4afp8.srt.virtual_deepep import virtual_deepep

    with virtual_deepep(OneBatch(batch, rank, RANKS, LOCAL), quantize_rows, rank, RANKS):
        yield


def build(
    tensors: dict[int, dict[str, torch.Tensor]],
    group: int = 128,
    scheme: ActivationScheme = ActivationScheme.STATIC,
    **options: Any,
) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    sizes = shape(group)
    return load_experts(
        ShardedW4AFp8Config(QuantSpec(group_size=group, moe_activation=scheme)),
        tensors[group],
        PREFIX,
        num_experts=sizes.experts,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        top_k=TOP_K,
        dtype=torch.bfloat16,
        routed_scaling_factor=SCALING,
        **options,
    )


def forward(layer: Any, batch: cases.Routing, extend: bool) -> torch.Tensor:
    from sglang_w4afp8.srt.virtual_deepep import run_through_deepep

    return run_through_deepep(layer, *batch, low_latency=not extend)


def wanted_of(
    weights: MoEWeights, batch: cases.Routing, scheme: ActivationScheme, fp8: bool
) -> torch.Tensor:
    x, scale = quantize_rows(batch.x) if fp8 else (batch.x, None)
    return moe_reference(
        x, weights, batch.topk_weights, batch.topk_ids, scheme=scheme, x_scale=scale
    )


@pytest.mark.parametrize("extend", [True, False], ids=["normal", "low-latency"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("group", "scheme"),
    [(128, "static"), (64, "dynamic_per_token"), (32, "static")],
)
def test_dispatch_experts_combine(
    tensors: dict[int, dict[str, torch.Tensor]],
    batch: cases.Routing,
    group: int,
    scheme: str,
    dtype: str,
    extend: bool,
) -> None:
    from sglang_w4afp8.srt.moe import ShardedW4AFp8MoEMethod

    activation = ActivationScheme(scheme)
    total = torch.zeros(TOKENS, 256, dtype=torch.float64)
    for rank in range(RANKS):
        with rank_of(rank, batch):
            layer = build(tensors, group, activation)
            assert type(layer).__name__ == "DeepEPMoE"
            assert type(layer.quant_method) is ShardedW4AFp8MoEMethod
            if dtype != "auto":
                layer.dispatcher.set_quant_config({"dispatcher_output_dtype": dtype})
            fp8 = modes_of(layer)[0 if extend else 1].use_fp8
            total += forward(layer, batch, extend)
    assert dtype == "auto" or fp8 is (dtype == "fp8")
    weights = cases.whole_weights(tensors[group], PREFIX, group)
    wanted = wanted_of(weights, batch, activation, fp8)
    # BF16 results, and E4M3 codes that fall on the other side of a boundary in float32.
    assert cases.calc_diff(total, wanted) < 2e-5
    other = wanted_of(weights, batch, activation, not fp8)
    assert cases.calc_diff(total, other) > 1e-4, "the form of the rows made no difference"


@pytest.mark.parametrize("extend", [True, False], ids=["normal", "low-latency"])
def test_bf16_by_environment_takes_the_other_road(
    tensors: dict[int, dict[str, torch.Tensor]],
    batch: cases.Routing,
    monkeypatch: pytest.MonkeyPatch,
    extend: bool,
) -> None:
    """``DeepEPMoE`` then ends in ``apply``, which SGLang's own method does not expect."""
    monkeypatch.setenv("SGLANG_DEEPEP_BF16_DISPATCH", "1")
    total = torch.zeros(TOKENS, 256, dtype=torch.float64)
    for rank in range(RANKS):
        with rank_of(rank, batch):
            layer = build(tensors)
            assert layer.deprecate_flag
            core = layer.run_moe_core(dispatched(layer, batch, extend))
            total += layer.dispatcher.combine(combine_input=core)
    weights = cases.whole_weights(tensors[128], PREFIX, 128)
    wanted = wanted_of(weights, batch, ActivationScheme.STATIC, False)
    assert cases.calc_diff(total, wanted) < 2e-5


def dispatched(layer: Any, batch: cases.Routing, extend: bool) -> Any:
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    set_is_extend_in_batch(extend)
    topk = StandardTopKOutput(batch.topk_weights, batch.topk_ids, batch.x[:, :1])
    return layer.dispatcher.dispatch(hidden_states=batch.x, topk_output=topk)


@pytest.mark.parametrize("extend", [True, False], ids=["normal", "low-latency"])
def test_a_rank_without_tokens_returns_bf16(
    tensors: dict[int, dict[str, torch.Tensor]],
    extend: bool,
) -> None:
    """Where 0.5.16's own method hands E4M3 to a combine that knows BF16 alone."""
    batch = cases.random_routing(3, shape(128), TOP_K, dtype=torch.bfloat16)
    batch.topk_ids.fill_(0)
    with rank_of(1, batch):
        layer = build(tensors)
        layer.dispatcher.set_quant_config({"dispatcher_output_dtype": "fp8"})
        sent = dispatched(layer, batch, extend)
        assert sent.hidden_states.dtype == torch.float8_e4m3fn
        core = layer.run_moe_core(sent)
        assert core.hidden_states.dtype == torch.bfloat16
        assert core.hidden_states.shape == sent.hidden_states.shape
        out = layer.dispatcher.combine(combine_input=core)
    assert torch.equal(out, torch.zeros_like(out))


def test_the_router_weight_is_left_to_combine_and_the_scaling_to_the_model(
    tensors: dict[int, dict[str, torch.Tensor]],
) -> None:
    from sglang.srt.layers.moe.token_dispatcher import DeepEPNormalDispatchOutput

    batch = cases.random_routing(4, shape(128), TOP_K, dtype=torch.bfloat16)
    with rank_of(0, batch):
        layer = build(tensors)
        assert layer.moe_runner_config.routed_scaling_factor == SCALING
        method = layer.quant_method
        slots = dispatched(layer, batch, False)
        loud = slots._replace(topk_weights=slots.topk_weights * 100)
        assert torch.equal(
            method.apply_deepep_ll(layer, slots), method.apply_deepep_ll(layer, loud)
        )
        sent = dispatch_tokens(batch, 0, LOCAL, True)
        tokens = DeepEPNormalDispatchOutput(
            sent.rows, sent.row_scale, sent.topk_ids, sent.topk_weights, [0] * LOCAL
        )
        loud = tokens._replace(topk_weights=tokens.topk_weights * 2)
        once, twice = (method.apply_deepep_normal(layer, t) for t in (tokens, loud))
        assert torch.equal(once * 2, twice)


def test_rows_are_asked_for_in_the_form_the_card_can_use(
    tensors: dict[int, dict[str, torch.Tensor]],
    batch: cases.Routing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang's default is BF16 for the runner that it resolves W4AFP8 to, else E4M3."""
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    from sglang_w4afp8.layer import Device
    from sglang_w4afp8.srt.deepep import row_dtypes

    for runner in (MoeRunnerBackend.AUTO, MoeRunnerBackend.CUTLASS):
        monkeypatch.setattr(moe_flags(), "runner_backend", runner)
        with rank_of(0, batch):
            layer = build(tensors)
        normal, low_latency = modes_of(layer)
        assert low_latency.use_fp8
        # 0.5.16 has one key for both modes.
        assert normal.use_fp8 is not hasattr(normal, "dispatch_mode")
    problem = layer.quant_method.problem
    cards = {(8, 0): "bf16", (8, 9): "fp8", (9, 0): "fp8", (10, 0): "bf16"}
    for capability, wanted in cards.items():
        asked = row_dtypes(replace(problem, device=Device("cuda", capability)))
        assert asked["low_latency_dispatcher_output_dtype"] == wanted
        assert asked["dispatcher_output_dtype"] == wanted
        assert asked["normal_dispatcher_output_dtype"] == "bf16"
    assert row_dtypes(replace(problem, hidden_size=320))["dispatcher_output_dtype"] == "bf16"


def modes_of(layer: Any) -> tuple[Any, Any]:
    """SGLang's dispatchers for prefill and for decoding."""
    (inner,) = layer.dispatcher._inners
    return inner._normal_dispatcher, inner._low_latency_dispatcher


@pytest.mark.parametrize("kin", ["mooncake", "nixl", "pplx"])
def test_kin_with_the_same_entry_points(
    tensors: dict[int, dict[str, torch.Tensor]],
    batch: cases.Routing,
    kin: str,
) -> None:
    """Their rows have the classes below; their dispatchers are not built here."""
    from sglang.srt.layers.moe import token_dispatcher
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    from sglang_w4afp8.srt import moe

    name = {"mooncake": "Mooncake", "nixl": "NixlEP", "pplx": "Pplx"}[kin]
    form = getattr(token_dispatcher, f"{name}DispatchOutput", None)
    if form is None:
        pytest.skip(f"this SGLang has no {kin}")
    with rank_of(0, batch):
        layer = build(tensors)
        with behind(MoeA2ABackend(kin)):
            chosen = moe.choose_moe_method(layer.quant_config, layer, PREFIX)
        assert type(chosen) is moe.ShardedW4AFp8MoEMethod and chosen.dispatched
        sent = dispatch_slots(batch, 0, LOCAL, 16, True)
        rows = form(sent.rows, sent.row_scale, batch.topk_ids, batch.topk_weights, sent.masked_m, 3)
        out = torch.zeros(TOKENS, 256, dtype=torch.float64)
        sent.combine(layer.run_moe_core(rows).hidden_states, out)
    ids = torch.where(batch.topk_ids < LOCAL, batch.topk_ids, -1)
    own = cases.Routing(batch.x, batch.topk_weights, ids)
    weights = cases.whole_weights(tensors[128], PREFIX, 128)
    wanted = wanted_of(weights, own, ActivationScheme.STATIC, True)
    assert cases.calc_diff(out, wanted) < 2e-5


def moe_flags() -> Any:
    from sglang.srt.runtime_context import get_flags

    return get_flags().moe


def behind(dispatcher: Any) -> Any:
    """Another dispatcher, for a block within :func:`rank_of`, which restores its own at its end."""
    return patch.object(moe_flags(), "a2a_backend", dispatcher)


def test_nothing_is_left_behind(batch: cases.Routing) -> None:
    before = moe_flags().a2a_backend
    with rank_of(0, batch):
        assert moe_flags().a2a_backend is not before
    assert moe_flags().a2a_backend is before


def test_refusals(
    tensors: dict[int, dict[str, torch.Tensor]],
    batch: cases.Routing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    from sglang_w4afp8.srt import moe

    with rank_of(0, batch):
        layer = build(tensors)
        method, sent = layer.quant_method, dispatched(layer, batch, False)
        packed = sent.hidden_states_scale[..., :1].to(torch.int32)
        for bad, text in (
            (sent._replace(hidden_states_scale=None), "with no scales"),
            (sent._replace(hidden_states_scale=packed), "scales torch.int32 (2, "),
            (sent._replace(hidden_states_scale=packed.float()), "scales torch.float32 (2, "),
            (sent._replace(hidden_states=sent.hidden_states.half()), "rows torch.float16"),
            (sent._replace(hidden_states=sent.hidden_states.view(torch.uint8)), "torch.uint8"),
        ):
            with pytest.raises(BackendError) as caught:
                method.apply_deepep_ll(layer, bad)
            assert text in str(caught.value)
            assert "(1) --deepep-dispatcher-output-dtype bf16" in str(caught.value)
        layer.down_gemm_overlap_args = object()
        with pytest.raises(BackendError, match="wait for a signal"):
            method.apply_deepep_ll(layer, sent)
        with pytest.raises(BackendError, match="with a token dispatcher"):
            build(tensors, apply_router_weight_on_input=True)
        monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "cutlass")
        with pytest.raises(BackendError, match="rows of a dispatcher"):
            build(tensors)
        # A dispatcher with entry points of its own keeps SGLang's method where that is right.
        with behind(MoeA2ABackend.FLASHINFER):
            chosen = moe.choose_moe_method(layer.quant_config, layer, PREFIX)
            assert type(chosen) is moe.W4AFp8MoEMethod
            layer.quant_config.group_size = 64
            with pytest.raises(BackendError, match="--moe-a2a-backend deepep"):
                moe.choose_moe_method(layer.quant_config, layer, PREFIX)
