"""``plan`` against SGLang itself: refusals, what is lost silently, cache bytes, memory fraction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.testing import cases
from sglang_w4afp8.tools.plan_gpus import GPUS
from sglang_w4afp8.tools.plan_model import Model
from sglang_w4afp8.tools.plan_ranks import default_mem_fraction, plan_kv
from sglang_w4afp8.tools.plan_source import built_in, find_model
from sglang_w4afp8.tools.plan_stock import block_refusal, lost_columns, stock_answer

pytestmark = pytest.mark.sglang
# plan sizes the cache as this release does; later ones compute it from more of the server's state.
as_in_0_5_16 = pytest.mark.skipif(
    not version("sglang").startswith("0.5.16"), reason="the rule of SGLang 0.5.16"
)

MODELS = [entry["names"][0] for entry in built_in()]
DEGREES = (4, 8, 16, 32, 64)
PREFIX = cases.EXPERTS_PREFIX


@pytest.fixture(autouse=True)
def quiet_cpu_fp8() -> Iterator[None]:
    from sglang_w4afp8.srt import cpu_fp8

    cpu_fp8.install()
    logger = logging.getLogger("sglang.srt.layers.quantization.w4afp8")
    before, _ = logger.level, logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("name", MODELS)
def test_linears_are_refused_as_foretold(name: str, sglang_linear: Callable[..., Any]) -> None:
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    model = find_model(name)
    for tp in [tp for tp in DEGREES if tp in model.degrees()]:
        for linear in model.linears:
            refusal = None
            try:
                with virtual_rank(tp - 1, tp):
                    layer = sglang_linear(linear, W4AFp8Config(), linear.path)
            except ValueError as error:
                refusal = str(error)
            assert block_refusal(linear, tp) == refusal, f"{linear.path} at tp {tp}"
            if refusal is None:
                shard = linear.shard(tp - 1, tp, (128, 128))
                assert tuple(layer.weight.shape) == (shard.height, shard.columns.size)
                assert tuple(layer.weight_scale_inv.shape) == shard.scale_shape


@pytest.mark.parametrize("name", MODELS)
def test_the_check_before_loading(name: str) -> None:
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    model = find_model(name)
    stated = {"weight_block_size": [128, 128]} if model.states_block else {}
    config = SimpleNamespace(
        hf_config=SimpleNamespace(quantization_config=stated),
        hf_text_config=SimpleNamespace(moe_intermediate_size=model.expert_width),
    )
    for tp in model.degrees():
        for ep in (1, tp):
            if model.experts % ep:
                continue
            reasons = stock_answer(model, tp, ep, None).reasons
            foretold = bool(reasons) and reasons[0].startswith("For quantized MoE")
            try:
                moe_ep_setup.check_quantized_moe_compatibility(
                    model_config=config, tp_size=tp, moe_ep_size=ep, moe_dp_size=1
                )
                assert not foretold, f"tp {tp} ep {ep}"
            except ValueError as error:
                assert foretold and str(error).startswith(reasons[0])


def test_a_checkpoint_of_another_method(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    from sglang_w4afp8.testing import tiny

    folder = tiny.write_deepseek(tmp_path)
    with pytest.raises(ValueError) as caught:
        ModelConfig(str(folder), quantization="w4afp8")
    assert stock_answer(find_model(str(folder)), 1, 1, None).reasons[0] == str(caught.value)


def stock_experts(width: int, tp: int, group: int = 128) -> Any:
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import load_experts, virtual_rank

    shape = cases.ExpertShape(1, 128, width, group)
    with virtual_rank(tp - 1, tp):
        return load_experts(
            W4AFp8Config(), cases.expert_tensors(shape, PREFIX), PREFIX, num_experts=1,
            hidden_size=128, intermediate_size=width, top_k=1, dtype=torch.bfloat16,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("width", "tp", "held", "needed"),
    [(2048, 32, 0, 1), (1536, 8, 1, 2), (2560, 8, 2, 3), (1408, 8, 1, 3), (2048, 16, 1, 1)],
)
def test_scale_columns_that_are_lost(width: int, tp: int, held: int, needed: int) -> None:
    assert lost_columns(width, tp) == (held, needed)
    layer = stock_experts(width, tp)
    assert layer.w2_weight_scale_inv.numel() == held * 128
    # Input scales that never came are 1, which is what "no dynamic activation scales" means.
    assert layer.w13_input_scale.item() == layer.w2_input_scale.item() == 1.0


def test_finer_groups_are_refused_while_loading() -> None:
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        stock_experts(2048, 8, group=64)
    model = with_spec(group_size=64)
    assert "group scales of 64" in stock_answer(model, 8, 1, None).reasons[0]


def test_plain_linears_are_refused_while_loading() -> None:
    from sglang.srt.layers.linear import ColumnParallelLinear
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    reason = stock_answer(find_model("glm-4.5"), 4, 1, None).reasons[0]
    with virtual_rank(0, 1):
        layer = ColumnParallelLinear(
            128, 128, bias=False, quant_config=W4AFp8Config(), params_dtype=torch.bfloat16
        )
        with pytest.raises(ValueError) as caught:
            layer.weight_loader_v2(layer.weight, torch.ones(128, 128, dtype=torch.bfloat16))
    assert reason == f"loading self_attn.qkv_proj: {caught.value}"


def test_other_blocks_are_refused_while_loading() -> None:
    from sglang.srt.layers.linear import ColumnParallelLinear
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    assert "per 64×64" in stock_answer(with_spec(weight_block_size=(64, 64)), 8, 1, None).reasons[0]
    with virtual_rank(1, 2):
        layer = ColumnParallelLinear(
            256, 512, bias=False, quant_config=W4AFp8Config(), params_dtype=torch.bfloat16
        )
        with pytest.raises(AssertionError):
            layer.weight_loader_v2(layer.weight_scale_inv, torch.ones(8, 4))


class Off(SimpleNamespace):
    """Any switch that was not given is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return False


def with_spec(**fields: Any) -> Model:
    return replace(find_model("deepseek-r1"), spec=QuantSpec(**fields))


def test_what_the_config_class_drops() -> None:
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    assert W4AFp8Config.get_min_capability() == 90
    said = {
        "quant_method": "w4afp8", "group_size": 64, "weight_block_size": [64, 64],
        "moe_activation_scheme": "dynamic", "modules_to_not_convert": ["model.layers.0"],
    }  # fmt: skip
    config = W4AFp8Config.from_config(said)
    assert config.group_size == 128
    assert config.weight_block_size == [128, 128]
    assert config.moe_activation_scheme == "static"
    assert config.ignored_layers == []


@as_in_0_5_16
def test_cache_bytes() -> None:
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    for entry in built_in():
        config, model = entry["config"], find_model(entry["names"][0])
        kv_heads = config["num_key_value_heads"]
        wide = Off(
            hf_config=Off(**config),
            kv_lora_rank=config.get("kv_lora_rank"),
            qk_rope_head_dim=config.get("qk_rope_head_dim"),
            head_dim=config.get("head_dim"),
            v_head_dim=config.get("head_dim"),
            get_num_kv_heads=lambda size, heads=kv_heads: max(1, heads // size),
        )
        kvc = Off(
            model_config=wide,
            kv_cache_dtype=torch.bfloat16,
            use_mla_backend=model.attention == "MLA",
            server_args=Off(kv_cache_dtype="auto"),
            layer_info=SimpleNamespace(start_layer=0, end_layer=model.layers),
        )
        pool = object.__new__(DefaultPoolConfigurator)
        for tp in (2, 8, 32):
            with virtual_rank(0, tp):
                cell = pool._compute_cell_size(kvc, model.layers)
            assert plan_kv(model, tp, GPUS["h200"], 0).bytes_per_token == cell, model.name


@as_in_0_5_16
def test_memory_fraction() -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.server_args import ServerArgs

    phase = {"max_bs": None, "bs": None, "backend": Backend.FULL}
    for name, gpu, tp in product(("deepseek-r1", "qwen3-235b"), GPUS.values(), (2, 8, 32)):
        model = find_model(name)
        args = object.__new__(ServerArgs)
        vars(args).update(
            cuda_graph_config=SimpleNamespace(
                decode=SimpleNamespace(**phase), prefill=SimpleNamespace(**phase)
            ),
            tp_size=tp, pp_size=1, device="cuda", model_path="",
            use_mla_backend=lambda model=model: model.attention == "MLA",
            get_model_config=lambda: SimpleNamespace(is_multimodal=False),
        )  # fmt: skip
        args._handle_gpu_memory_settings(gpu.memory_mib)
        assert default_mem_fraction(model, tp, gpu) == args.mem_fraction_static, (name, gpu, tp)
