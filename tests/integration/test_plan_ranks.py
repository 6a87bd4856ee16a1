"""``plan``'s bytes against the parameters that the real layers register, and real checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8 import cli
from sglang_w4afp8.tools.plan_gpus import GPUS
from sglang_w4afp8.tools.plan_model import Linear
from sglang_w4afp8.tools.plan_ranks import plan_rank
from sglang_w4afp8.tools.plan_source import built_in, find_model

pytestmark = pytest.mark.sglang


def parameter_bytes(layer: torch.nn.Module) -> int:
    """Weights and scales; one number per expert (input scales) is not counted by ``plan``."""
    named = dict(layer.named_parameters())
    return sum(p.nbytes for name, p in named.items() if not name.endswith("input_scale"))


def prefix_of(linear: Linear) -> str:
    """Its name in the first layer that has it."""
    return f"model.layers.{linear.layers.start}.{linear.path}"


@pytest.mark.parametrize("name", [entry["names"][0] for entry in built_in()])
@pytest.mark.parametrize(("tp", "ep"), [(8, 1), (32, 1), (32, 8)])
def test_bytes_are_those_of_the_layers(
    name: str, tp: int, ep: int, sglang_linear: Callable[..., Any]
) -> None:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    from sglang_w4afp8.srt import cpu_fp8
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    cpu_fp8.install()
    model = find_model(name)
    config = ShardedW4AFp8Config(model.spec)
    # Ada keeps small FP8 blocks as they are loaded, and its backend pads nothing.
    rows = {row.name: row for row in plan_rank(model, tp, ep, GPUS["l40s"]).rows}
    with virtual_rank(tp - 1, tp, ep), torch.device("meta"):
        experts = FusedMoE(
            num_experts=model.experts, hidden_size=model.hidden,
            intermediate_size=model.expert_width, layer_id=model.moe_layers.start,
            top_k=model.top_k, params_dtype=torch.bfloat16, quant_config=config,
            prefix=f"model.layers.{model.moe_layers.start}.mlp.experts",
        )  # fmt: skip
        linears = [
            (linear, sglang_linear(linear, config if linear.fp8 else None, prefix_of(linear)))
            for linear in model.linears
        ]
    up, down = rows["experts gate, up"], rows["experts down"]
    assert up.nbytes + down.nbytes == len(model.moe_layers) * parameter_bytes(experts)
    assert (up.copies, *up.local_shape[:1]) == experts.w13_weight.shape[:2]
    for linear, layer in linears:
        row = rows[f"{linear.kind} {linear.path.rpartition('.')[2]}"]
        assert row.local_shape == tuple(layer.weight.shape), linear.path
        if "→BF16" not in row.scales:
            assert row.nbytes == len(linear.layers) * parameter_bytes(layer), linear.path


@pytest.mark.parametrize("name", ["deepseek", "qwen", "qwen-group-32"])
def test_converted_checkpoints_have_nothing_odd(
    name: str, checkpoint_of: Callable[[str], Path], capsys: Any
) -> None:
    folder = checkpoint_of(name)
    assert cli.main(["plan", str(folder), "--tp", "4", "--gpu", "h200", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["model"]["problems"] == []
    assert made["model"]["notes"] == []
    source = folder.parent / f"{name}-source"
    assert cli.main(["plan", str(source), "--tp", "4", "--gpu", "h200", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert "planned as" in planned["model"]["notes"][0]
    if name != "qwen-group-32":
        assert planned["rank"] == made["rank"]
