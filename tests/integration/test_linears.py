"""SGLang's real parallel linears with block-FP8 weights, loaded as every rank of any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sglang")

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.layer import Device
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = pytest.mark.sglang

HIDDEN = 256


@pytest.fixture(autouse=True)
def cpu_fp8() -> None:
    """Stock FP8 linears need a GPU; the CPU platform's torch form stands in for aligned ones."""
    from sglang_w4afp8.srt import cpu_fp8

    cpu_fp8.install()


@pytest.fixture(autouse=True)
def weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")


def config(**fields: Any) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    return ShardedW4AFp8Config(QuantSpec(**fields))


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

    tensors = cases.fp8_mlp_tensors("mlp", HIDDEN, intermediate, seed=intermediate)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    expected = cases.fp8_mlp_reference(x, tensors, "mlp")
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
    tensors: dict[str, torch.Tensor] = {}
    for module, rows in {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.items():
        tensors |= cases.fp8_linear_tensors(
            f"a.{module}", rows * head, HIDDEN, seed=generator, scales=cases.ScaleRange(1.0, 0.0)
        )
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
            whole = cases.fp8_dense(tensors, f"a.{module}")[start : start + rows]
            torch.testing.assert_close(part.double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)


def test_absorbed_projection_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-5's kv_b_proj at tp 64: one head of 448 rows = 3.5 blocks. See ``Device.keeps_fp8``."""
    from sglang.srt.layers.linear import ColumnParallelLinear

    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    hopper = Device("cuda", (9, 0), "H100")
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: hopper))
    for name in ("a.kv_b_proj", "a.q_b_proj"):
        tensors = cases.fp8_linear_tensors(name, 2 * 448, HIDDEN, seed=5)
        with virtual_rank(1, 2):
            layer = ColumnParallelLinear(
                HIDDEN, 2 * 448, bias=False, quant_config=config(), prefix=name,
                params_dtype=torch.float32,
            )  # fmt: skip
            load_linear(layer, name, tensors)
        assert layer.quant_method.regrouped.block == (64, 128)
        if name == "a.q_b_proj":
            assert layer.weight.dtype == torch.float8_e4m3fn
        else:
            assert torch.equal(layer.weight, cases.fp8_dense(tensors, name)[448:].float())


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

    tensors = cases.fp8_mlp_tensors("mlp", HIDDEN, 1536, seed=1536)
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
