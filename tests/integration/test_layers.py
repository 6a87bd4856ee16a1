"""SGLang's real FusedMoE and parallel linears, loaded as every rank of any layout.

The whole layer (one rank) is the judge of the parts, and the float64 oracle of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sglang")

from sglang_w4afp8.errors import BackendError, CheckpointError, ConfigError, ShardError
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import dequantize_fp8_block, moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec

pytestmark = pytest.mark.sglang

PREFIX = "model.layers.1.mlp.experts"
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
def cpu_fp8() -> None:
    """Stock FP8 linears need a GPU; the CPU platform's torch form stands in for aligned ones."""
    from sglang_w4afp8.srt import cpu_fp8

    cpu_fp8.install()


@pytest.fixture(autouse=True)
def weights_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")
    yield


def expert_tensors(
    intermediate: int, group: int = 128, input_scale: float | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(intermediate)
    shapes = {
        "gate_proj": (intermediate, HIDDEN),
        "up_proj": (intermediate, HIDDEN),
        "down_proj": (HIDDEN, intermediate),
    }
    tensors = {}
    for expert in range(EXPERTS):
        for projection, (n, k) in shapes.items():
            codes = torch.randint(-8, 8, (n, k), generator=generator)
            scale = torch.rand(n, k // group, generator=generator) * 0.02 + 0.001
            name = f"{PREFIX}.{expert}.{projection}"
            tensors[f"{name}.weight"] = pack_int4(codes)
            tensors[f"{name}.weight_scale_inv"] = scale.bfloat16()
            if input_scale is not None:
                tensors[f"{name}.input_scale"] = torch.tensor([input_scale])
    return tensors


def whole_weights(tensors: dict[str, torch.Tensor], group: int = 128) -> MoEWeights:
    def stacked(projection: str, kind: str) -> torch.Tensor:
        names = [f"{PREFIX}.{e}.{projection}.{kind}" for e in range(EXPERTS)]
        return torch.stack([tensors[name] for name in names])

    def merged(kind: str) -> torch.Tensor:
        return torch.cat([stacked("gate_proj", kind), stacked("up_proj", kind)], dim=1)

    return MoEWeights(
        merged("weight"),
        merged("weight_scale_inv"),
        stacked("down_proj", "weight"),
        stacked("down_proj", "weight_scale_inv"),
        group,
        group,
        torch.tensor([0.01]),
        torch.tensor([0.01]),
    )


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return x, torch.rand(TOKENS, TOP_K, generator=generator), ids.int()


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
    tensors = expert_tensors(intermediate)
    expected = moe_reference(
        *_arguments(tensors), scheme=ActivationScheme.NONE, compute_dtype=torch.float64
    )
    total = sum_over_ranks(tensors, intermediate, tp, ep)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def _arguments(
    tensors: dict[str, torch.Tensor], group: int = 128
) -> tuple[torch.Tensor, MoEWeights, torch.Tensor, torch.Tensor]:
    x, weights, ids = routing()
    return x, whole_weights(tensors, group), weights, ids


@pytest.mark.parametrize("group", [32, 64])
def test_finer_groups(group: int) -> None:
    tensors = expert_tensors(1408, group)
    expected = moe_reference(*_arguments(tensors, group), scheme=ActivationScheme.NONE)
    total = sum_over_ranks(tensors, 1408, 8, 1, group_size=group)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def test_static_activations_are_the_same_at_every_tp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    tensors = expert_tensors(1536, input_scale=0.01)
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
    """What this package is for. When this fails, SGLang has mended it: adapt docs/upstream.md."""
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    with virtual_rank(1, tp):
        layer = build(
            expert_tensors(intermediate, input_scale=0.01),
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
    tensors = expert_tensors(512)
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

    tensors = expert_tensors(512)
    x, weights, ids = routing()
    with virtual_rank(0, 1):
        layer = build(tensors, 512)
        assert run_experts(layer, x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)
        nothing = run_experts(layer, x, weights, torch.full_like(ids, EXPERTS))
        assert torch.equal(nothing, torch.zeros_like(x))


def test_router_weight_on_input() -> None:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    tensors = expert_tensors(512)
    x, weights, ids = routing()
    with virtual_rank(0, 1):
        layer = build(tensors, 512, apply_router_weight_on_input=True)
        actual = run_experts(layer, x, weights[:, :1], ids[:, :1])
    expected = moe_reference(
        x * weights[:, :1], whole_weights(tensors), torch.ones(TOKENS, 1), ids[:, :1],
        scheme=ActivationScheme.NONE,
    )  # fmt: skip
    assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


def test_bfloat16_within_its_rounding() -> None:
    from sglang_w4afp8.srt.virtual_ranks import run_experts, virtual_rank

    tensors = expert_tensors(1536)
    x, weights, ids = routing()
    expected = moe_reference(
        x.bfloat16(), whole_weights(tensors), weights, ids, scheme=ActivationScheme.NONE
    )
    with virtual_rank(0, 1):
        layer = build(tensors, 1536, dtype=torch.bfloat16)
        actual = run_experts(layer, x.bfloat16(), weights, ids)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


# --------------------------------------------------------------------------- what must be refused


@pytest.mark.parametrize("kind", ["weight", "weight_scale_inv"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_tensor_is_named(projection: str, kind: str) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = expert_tensors(512)
    name = f"{PREFIX}.3.{projection}.{kind}"
    del tensors[name]
    # Expert 3 is slot 1 of the second expert-parallel rank; the message names the checkpoint's.
    with virtual_rank(1, 2, ep_size=2), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    assert name in str(caught.value)
    assert "1 of 6" in str(caught.value)


def test_missing_input_scales_need_an_explicit_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = expert_tensors(512, input_scale=0.01)
    del tensors[f"{PREFIX}.2.down_proj.input_scale"]
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    with virtual_rank(0, 1), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    assert f"{PREFIX}.2.down_proj.input_scale" in str(caught.value)
    assert "SGLANG_W4AFP8_ACTIVATION=dynamic" in str(caught.value)
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "dynamic")
    with virtual_rank(0, 1):
        build(tensors, 512)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_input_scales(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    tensors = expert_tensors(512, input_scale=0.01)
    tensors[f"{PREFIX}.0.gate_proj.input_scale"] = torch.tensor([value])
    with virtual_rank(0, 1), pytest.raises(CheckpointError, match="positive and finite"):
        build(tensors, 512)


@pytest.mark.parametrize(
    ("kind", "change", "numbers"),
    [
        ("weight", lambda t: t.to(torch.float8_e4m3fn), ["float8_e4m3fn", "int8"]),
        ("weight", lambda t: t[:, :100], ["(256, 100)", "(256, 256)"]),
        ("weight_scale_inv", lambda t: t[:, :3], ["(256, 3)", "(256, 4)"]),
        ("weight_scale_inv", lambda t: t.to(torch.int32), ["int32"]),
    ],
)
def test_wrong_dtypes_and_shapes(kind: str, change: Any, numbers: list[str]) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = expert_tensors(512)
    name = f"{PREFIX}.1.down_proj.{kind}"
    tensors[name] = change(tensors[name])
    with virtual_rank(0, 1), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    text = str(caught.value)
    assert name in text and "(1)" in text
    assert all(number in text for number in numbers)


def test_a_group_size_that_the_checkpoint_does_not_have() -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    with virtual_rank(0, 1), pytest.raises(CheckpointError, match="group_size 64"):
        build(expert_tensors(512, group=128), 512, config(group_size=64))


def test_layers_that_the_format_cannot_express() -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = expert_tensors(512)
    with virtual_rank(0, 1):
        with pytest.raises(ConfigError, match="biases"):
            build(tensors, 512, with_bias=True)
        with pytest.raises(ConfigError, match="one tensor holds all experts"):
            build(tensors, 512, use_weight_loader_fused=True)
        with pytest.raises(BackendError, match="swiglu_limit"):
            build(tensors, 512, swiglu_limit=7.0)
        with pytest.raises(BackendError, match="gelu"):
            build(tensors, 512, activation="gelu")
    with virtual_rank(0, 8), pytest.raises(ShardError, match="modules_to_not_convert"):
        build(tensors, 520)
    with virtual_rank(0, 512), pytest.raises(ShardError, match="512 / tp 512 = 1 columns"):
        build(tensors, 512)


# ------------------------------------------------------------------------------ block-FP8 linears


def mlp_tensors(intermediate: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(intermediate)
    tensors = {}
    for module, (n, k) in {
        "gate_proj": (intermediate, HIDDEN),
        "up_proj": (intermediate, HIDDEN),
        "down_proj": (HIDDEN, intermediate),
    }.items():
        weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator) * 0.02 + 0.001
        tensors[f"mlp.{module}.weight"] = weight
        tensors[f"mlp.{module}.weight_scale_inv"] = scale
    return tensors


def dense(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_inv"]
    return dequantize_fp8_block(weight, scale, (128, 128), torch.float64)


@pytest.mark.parametrize(
    ("intermediate", "tp", "block"),
    [
        (18432, 32, (64, 128)),  # R1's dense MLP: 576 = 4.5 blocks a rank
        (2048, 32, (64, 128)),  # R1's shared expert: half a block
        (1536, 8, (64, 128)),
        (1408, 8, (16, 128)),
        (18432, 8, None),  # divides: upstream's own parameters and loader
        (2048, 16, None),
    ],
)
def test_mlp_ranks_add_up(intermediate: int, tp: int, block: tuple[int, int] | None) -> None:
    from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    tensors = mlp_tensors(intermediate)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    gate, up = (x.double() @ dense(tensors, f"mlp.{m}").T for m in ("gate_proj", "up_proj"))
    expected = (F.silu(gate) * up) @ dense(tensors, "mlp.down_proj").T
    total = torch.zeros(3, HIDDEN)
    for rank in range(tp):
        with virtual_rank(rank, tp):
            common = {"bias": False, "quant_config": config(), "params_dtype": torch.float32}
            gate_up = MergedColumnParallelLinear(
                HIDDEN, [intermediate] * 2, prefix="mlp.gate_up_proj", **common
            )
            down = RowParallelLinear(
                intermediate, HIDDEN, prefix="mlp.down_proj", reduce_results=False, **common
            )
            load_linear(gate_up, "mlp.gate_up_proj", tensors)
            load_linear(down, "mlp.down_proj", tensors)
            regrouped = gate_up.quant_method.regrouped
            assert (regrouped.block if regrouped else None) == block
            inner_gate, inner_up = gate_up.quant_method.apply(gate_up, x).chunk(2, dim=-1)
            total += down.quant_method.apply(down, F.silu(inner_gate) * inner_up)
    assert (total - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_qkv_of_unaligned_heads(tp: int) -> None:
    """8 query and 2 key/value heads of 96: shards of 1.5 blocks, replicated beyond tp 2."""
    from sglang.srt.layers.linear import QKVParallelLinear

    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    generator = torch.Generator().manual_seed(3)
    head, heads, kv_heads = 96, 8, 2
    tensors = {}
    for module, rows in {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.items():
        weight = torch.randn(rows * head, HIDDEN, generator=generator).to(torch.float8_e4m3fn)
        tensors[f"a.{module}.weight"] = weight
        tensors[f"a.{module}.weight_scale_inv"] = torch.rand(-(-rows * head // 128), 2)
    x = torch.randn(3, HIDDEN, generator=generator)
    for rank in range(tp):
        with virtual_rank(rank, tp):
            layer = QKVParallelLinear(
                HIDDEN, head, heads, kv_heads, bias=False, quant_config=config(),
                prefix="a.qkv_proj", params_dtype=torch.float32,
            )  # fmt: skip
            load_linear(layer, "a.qkv_proj", tensors)
            out = layer.quant_method.apply(layer, x)
        q_rows, kv_rows = layer.num_heads * head, layer.num_kv_heads * head
        kv_start = rank // layer.num_kv_head_replicas * kv_rows
        starts = {"q_proj": (rank * q_rows, q_rows), "k_proj": (kv_start, kv_rows),
                  "v_proj": (kv_start, kv_rows)}  # fmt: skip
        for part, (module, (start, rows)) in zip(
            out.split([q_rows, kv_rows, kv_rows], dim=-1), starts.items(), strict=True
        ):
            whole = dense(tensors, f"a.{module}")[start : start + rows]
            torch.testing.assert_close(part.double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)


def test_linear_refusals() -> None:
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    def load(tensors: dict[str, torch.Tensor]) -> None:
        with virtual_rank(1, 8):
            layer = MergedColumnParallelLinear(
                HIDDEN, [1536] * 2, bias=False, quant_config=config(), prefix="mlp.gate_up_proj",
                params_dtype=torch.float32,
            )  # fmt: skip
            load_linear(layer, "mlp.gate_up_proj", tensors)

    tensors = mlp_tensors(1536)
    load(tensors)
    bf16 = tensors | {"mlp.up_proj.weight": torch.zeros(1536, HIDDEN, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        load(bf16)
    coarse = tensors | {"mlp.up_proj.weight_scale_inv": torch.ones(24, 2)}
    with pytest.raises(CheckpointError, match=r"\(24, 2\)"):
        load(coarse)


def test_what_is_left_unquantised() -> None:
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    def method(prefix: str, **fields: Any) -> str:
        with virtual_rank(0, 1):
            layer = ReplicatedLinear(256, 128, bias=False, params_dtype=torch.bfloat16)
            return type(config(**fields).get_quant_method(layer, prefix)).__name__

    plain = UnquantizedLinearMethod.__name__
    name = "model.layers.0.self_attn.b_proj"
    assert method(name) == "ShardedFp8LinearMethod"
    assert method(name, ignored_layers=(name,)) == plain
    assert method(name, ignored_layers=("model.layers.1.self_attn.b_proj",)) != plain
    assert method(name, weight_block_size=None) == plain


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
