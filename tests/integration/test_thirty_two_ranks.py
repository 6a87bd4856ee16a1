"""DeepSeek-R1's true widths at tp 32: all 32 ranks' loaders and layers against the unsharded model.

Two decoder layers without attention, whose shards divide at any degree here: a dense MLP (18432
wide, 576 = 4.5 FP8 blocks a rank) and a MoE layer (experts and shared expert 2048 wide, 64 columns
a rank: half an INT4 group, half an FP8 block), each with its residual and its all-reduce. Only the
number of experts is not the model's. The judge is the float64 oracle of the whole model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sglang")

from sglang_w4afp8.reference import dequantize_fp8_block, moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = pytest.mark.sglang

TP, HIDDEN, DENSE, EXPERT = 32, 7168, 18432, 2048
EXPERTS, TOP_K, TOKENS = 3, 2, 3
MLP, MOE = "model.layers.0.mlp", "model.layers.3.mlp"
SHAPE = cases.ExpertShape(EXPERTS, HIDDEN, EXPERT)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The checkpoint: INT4 experts, FP8 dense MLP and shared expert; 0.5 GB."""
    return (
        cases.expert_tensors(SHAPE, f"{MOE}.experts", seed=1, scales=cases.INT4_UNIT)
        | fp8_mlp(f"{MOE}.shared_experts", EXPERT)
        | fp8_mlp(MLP, DENSE)
    )


def fp8_mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
    """Like ``cases.fp8_mlp_tensors``, from random bytes: 400 million normal numbers take long."""
    generator = torch.Generator().manual_seed(width)
    made = {}
    for name, rows, columns in (
        ("gate_proj", width, HIDDEN), ("up_proj", width, HIDDEN), ("down_proj", HIDDEN, width),
    ):  # fmt: skip
        bits = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
        # Sign, mantissa and two bits of the exponent random: ± 0.25 … 3.75, no NaN.
        weight = bits.bitwise_and_(0x9F).add_(0x28).view(torch.float8_e4m3fn)
        scale = cases.FP8_UNIT.draw(rows // 128, columns // 128, columns, generator)
        made[f"{prefix}.{name}.weight"] = weight
        made[f"{prefix}.{name}.weight_scale_inv"] = scale
    return made


def unsharded(
    tensors: dict[str, torch.Tensor], routing: cases.Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the first and after the second layer, float64."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        # One row of blocks at a time: whole matrices are 1 GB each.
        rows = zip(
            tensors[f"{name}.weight"].split(128),
            tensors[f"{name}.weight_scale_inv"].split(1),
            strict=True,
        )
        block = cases.FP8_BLOCK
        parts = [x @ dequantize_fp8_block(w, s, block, torch.float64).T for w, s in rows]
        return torch.cat(parts, dim=1)

    def mlp(prefix: str, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(linear(f"{prefix}.gate_proj", x)) * linear(f"{prefix}.up_proj", x)
        return linear(f"{prefix}.down_proj", inner)

    x = routing.x.double()
    first = x + mlp(MLP, x)
    whole = cases.whole_weights(tensors, f"{MOE}.experts")
    routed = moe_reference(
        first, whole, routing.topk_weights, routing.topk_ids, scheme=ActivationScheme.NONE
    )
    return first, first + routed + mlp(f"{MOE}.shared_experts", first)


def test_all_ranks_add_up(
    tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_w4afp8.srt import cpu_fp8
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import (
        load_experts,
        load_mlp,
        run_experts,
        run_mlp,
        virtual_rank,
    )

    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")
    cpu_fp8.install()
    routing = cases.random_routing(TOKENS, SHAPE, TOP_K, seed=2)
    config = ShardedW4AFp8Config(QuantSpec())

    def mlp(prefix: str, width: int, x: torch.Tensor) -> torch.Tensor:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": width}
        layers = load_mlp(config, tensors, prefix, **sizes)
        shard = layers[0].quant_method.regrouped.shard
        assert [rows.size for rows in shard.rows] == [width // TP] * 2
        assert shard.block == (64, 128)
        return run_mlp(layers, x)

    def experts(x: torch.Tensor) -> torch.Tensor:
        layer: Any = load_experts(
            config, tensors, f"{MOE}.experts", num_experts=EXPERTS, hidden_size=HIDDEN,
            intermediate_size=EXPERT, top_k=TOP_K,
        )  # fmt: skip
        assert layer.w2_weight_scale_inv.shape == (EXPERTS, HIDDEN, 1)
        return run_experts(layer, x, routing.topk_weights, routing.topk_ids)

    def all_reduce(partial: Any) -> torch.Tensor:
        total = torch.zeros(TOKENS, HIDDEN)
        for rank in range(TP):
            with virtual_rank(rank, TP):
                total += partial()
        return total

    first = routing.x + all_reduce(lambda: mlp(MLP, DENSE, routing.x))
    shared = f"{MOE}.shared_experts"
    second = first + all_reduce(lambda: experts(first) + mlp(shared, EXPERT, first))

    for actual, expected in zip((first, second), unsharded(tensors, routing), strict=True):
        # float32 sums of thousands of terms.
        assert (actual - expected).abs().max() < 5e-6 * expected.abs().max()
    # Each part moves the result: an error in one would not hide behind the other.
    moved = (second - first).abs().amax() / second.abs().amax()
    assert moved > 0.1 and (first - routing.x).abs().amax() > 0.1 * first.abs().amax()
