"""The plugin on a patched SGLang 0.5.23. Run by test_series.py, with that tree on PYTHONPATH."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import sglang
import torch
import torch.nn.functional as F

from sglang_w4afp8 import plugin
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing import cases

ROOT = Path(os.environ["PATCHED_TREE"])
PREFIX = "model.layers.0.mlp.experts"
HIDDEN, EXPERTS, TOP_K = 256, 4, 2


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Through the gate, as ``load_plugins()`` does it."""
    assert Path(sglang.__file__).is_relative_to(ROOT)
    plugin.register()
    assert plugin.status().state == "registered", plugin.status().detail


def config(**fields: Any) -> Any:
    from sglang.srt.layers.quantization import get_quantization_config

    ours = get_quantization_config("w4afp8")
    assert ours.__name__ == "ShardedW4AFp8Config"
    return ours(QuantSpec(**fields))


@pytest.mark.parametrize(("intermediate", "tp", "group"), [(2048, 32, 128), (1536, 8, 64)])
def test_experts_of_all_ranks_add_up(
    monkeypatch: pytest.MonkeyPatch, intermediate: int, tp: int, group: int
) -> None:
    from sglang_w4afp8.srt.virtual_ranks import load_experts, run_experts, virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")
    shape = cases.ExpertShape(EXPERTS, HIDDEN, intermediate, group)
    tensors = cases.expert_tensors(shape, PREFIX, seed=tp)
    x, weights, ids = cases.random_routing(5, shape, TOP_K, seed=1)
    total = torch.zeros(5, HIDDEN)
    for rank in range(tp):
        with virtual_rank(rank, tp):
            layer = load_experts(
                config(group_size=group),
                tensors,
                PREFIX,
                num_experts=EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=intermediate,
                top_k=TOP_K,
            )
            assert type(layer.quant_method).__name__ == "ShardedW4AFp8MoEMethod"
            total += run_experts(layer, x, weights, ids)
    whole = cases.whole_weights(tensors, PREFIX, group)
    expected = moe_reference(x, whole, weights, ids, scheme=ActivationScheme.NONE)
    assert (total - expected).abs().max() < 5e-6 * expected.abs().max()


def test_linears_that_upstream_would_now_take_are_still_ours() -> None:
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    from sglang_w4afp8.srt.virtual_ranks import load_linear, virtual_rank

    tensors = cases.fp8_mlp_tensors("mlp", HIDDEN, 18432, seed=3)
    with virtual_rank(1, 32):
        layer = MergedColumnParallelLinear(
            HIDDEN,
            [18432] * 2,
            bias=False,
            params_dtype=torch.float32,
            quant_config=config(),
            prefix="mlp.gate_up_proj",
        )
        load_linear(layer, "mlp.gate_up_proj", tensors)
    method = layer.quant_method
    assert method.regrouped is not None and method.regrouped.block == (64, 128)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    gate, up = method.apply(layer, x).chunk(2, dim=-1)
    for part, name in ((gate, "gate_proj"), (up, "up_proj")):
        dense = cases.fp8_dense(tensors, f"mlp.{name}")[576:1152].float()
        torch.testing.assert_close(part, F.linear(x, dense))


def test_plugin_and_patch_lift_the_block_check() -> None:
    """Both do, for the same models; neither undoes the other."""
    from types import SimpleNamespace

    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    for name in ("w4afp8", "fp8"):
        model = SimpleNamespace(
            quantization=name,
            hf_config=SimpleNamespace(quantization_config={"weight_block_size": [128, 128]}),
            hf_text_config=SimpleNamespace(moe_intermediate_size=2048),
        )
        layout = {"tp_size": 32, "moe_ep_size": 1, "moe_dp_size": 1}
        if name == "w4afp8":
            moe_ep_setup.check_quantized_moe_compatibility(model_config=model, **layout)
        else:
            with pytest.raises(ValueError, match="moe_tp_size=32"):
                moe_ep_setup.check_quantized_moe_compatibility(model_config=model, **layout)


def test_documents_name_real_keys_and_messages() -> None:
    """Patch 7: the example is a valid config and the listed messages are in the code."""
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    page = (ROOT / "docs_new/docs/advanced_features/w4afp8.mdx").read_text()
    example = json.loads(re.search(r"```json Example\n(.*?)```", page, re.S)[1])
    read = W4AFp8Config.from_config(example)
    assert read.group_size == example["group_size"]
    assert read.weight_block_size == example["weight_block_size"]
    assert read.moe_activation_scheme == example["moe_activation_scheme"]
    assert set(example["modules_to_not_convert"]) <= set(read.ignored_layers)
    code = (ROOT / "python/sglang/srt/layers/quantization/w4afp8.py").read_text()
    code = re.sub(r'"\s*f?"', "", code).replace("{name}", "NAME")
    messages = re.findall(r"^\| `([^`]+)` \|", page.split("## Messages")[1], re.M)
    assert len(messages) == 5
    for message in messages:
        message = re.sub(r"w(13|2)_\w+", "NAME", message)
        assert message in code, message
