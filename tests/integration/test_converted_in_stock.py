"""A checkpoint made by ``convert`` in SGLang as released, without this package's plugin.

SGLang's own config class, detection, name mapping and expert loader run on the CPU; what ends up in
the parameters is compared with the checkpoint. Only the kernel itself needs a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.checkpoint.act_scales import static_scale
from sglang_w4afp8.testing import tiny
from sglang_w4afp8.testing.checkpoints import tensors_of
from sglang_w4afp8.tools.convert import convert_checkpoint
from sglang_w4afp8.tools.inspect import inspect_checkpoint

pytestmark = pytest.mark.sglang

LAYER = 1
PREFIX = f"model.layers.{LAYER}.mlp.experts"
AMAX = {"w13": 3.3, "w2": 0.19}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    amax = {
        f"model.layers.{layer}.mlp.experts.{gemm}": value
        for layer in range(3)
        for gemm, value in AMAX.items()
    }
    (root / "amax.json").write_text(json.dumps(amax))
    made = {}
    for name, write in (("deepseek", tiny.write_deepseek), ("qwen", tiny.write_qwen)):
        source = write(root / f"{name}-source")
        made[name] = root / name
        convert_checkpoint(source, made[name], act_scales=root / "amax.json")
    return made


def stock_layer(folder: Path, tensors: dict[str, torch.Tensor], tp: int = 1, rank: int = 0) -> Any:
    """SGLang's FusedMoE under its own W4AFp8Config, loaded as the DeepSeek loader does."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    config = json.loads((folder / "config.json").read_text())
    experts = config.get("n_routed_experts") or config["num_experts"]
    quant = W4AFp8Config.from_config(dict(config["quantization_config"]))
    with virtual_rank(rank, tp):
        layer = FusedMoE(
            num_experts=experts,
            hidden_size=config["hidden_size"],
            intermediate_size=config["moe_intermediate_size"],
            layer_id=LAYER,
            top_k=2,
            params_dtype=torch.bfloat16,
            quant_config=quant,
            prefix=PREFIX,
        )
        mapping = FusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="gate_proj",
            ckpt_down_proj_name="down_proj",
            ckpt_up_proj_name="up_proj",
            num_experts=experts,
        )
        if config["model_type"].startswith("deepseek"):
            mapping += FusedMoE.make_expert_input_scale_params_mapping(num_experts=experts)
        parameters = {f"{PREFIX}.{name}": value for name, value in layer.named_parameters()}
        unused = []
        for name, tensor in tensors.items():
            if not name.startswith(f"{PREFIX}."):
                continue
            for parameter_name, weight_name, expert, shard in mapping:
                if weight_name not in name:
                    continue
                target = name.replace(weight_name, parameter_name)
                parameter = parameters[target]
                parameter.weight_loader(parameter, tensor, target, shard_id=shard, expert_id=expert)
                break
            else:
                unused.append(name)
        assert not unused, unused[:3]
    return layer


@pytest.mark.parametrize("model", ["deepseek", "qwen"])
@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (4, 3)])
def test_every_expert_tensor_arrives(
    checkpoints: dict[str, Path], model: str, tp: int, rank: int
) -> None:
    folder = checkpoints[model]
    tensors = tensors_of(folder)
    layer = stock_layer(folder, tensors, tp, rank)
    inner = json.loads((folder / "config.json").read_text())["moe_intermediate_size"] // tp
    part = slice(rank * inner, (rank + 1) * inner)
    packed = slice(rank * inner // 2, (rank + 1) * inner // 2)
    groups = slice(rank * inner // 128, (rank + 1) * inner // 128)
    for expert in range(layer.num_experts):
        name = f"{PREFIX}.{expert}"
        expected = torch.cat(
            [tensors[f"{name}.gate_proj.weight"][part], tensors[f"{name}.up_proj.weight"][part]]
        )
        assert torch.equal(layer.w13_weight[expert], expected)
        down = tensors[f"{name}.down_proj.weight"]
        assert torch.equal(layer.w2_weight[expert], down[:, packed])
        scale = torch.cat(
            [
                tensors[f"{name}.gate_proj.weight_scale_inv"][part],
                tensors[f"{name}.up_proj.weight_scale_inv"][part],
            ]
        )
        assert torch.equal(layer.w13_weight_scale_inv[expert], scale.float())
        scale = tensors[f"{name}.down_proj.weight_scale_inv"][:, groups]
        assert torch.equal(layer.w2_weight_scale_inv[expert], scale.float())
    layer.quant_method.process_weights_after_loading(layer)
    # BF16 rounding inside SGLang changed nothing: the values were BF16 numbers to begin with.
    assert layer.w13_input_scale.item() == static_scale(AMAX["w13"])
    assert layer.w2_input_scale.item() == static_scale(AMAX["w2"])
    assert layer.w13_weight_scale_inv.dtype == torch.bfloat16


def test_scales_that_are_no_bf16_numbers_would_not_load(checkpoints: dict[str, Path]) -> None:
    """Why convert rounds: the loader compares up's value with gate's rounded one."""
    folder = checkpoints["deepseek"]
    tensors = tensors_of(folder)
    for name in tensors:
        if name.endswith("input_scale"):
            tensors[name] = torch.tensor([0.0512345])
    with pytest.raises(ValueError, match="must be equal"):
        stock_layer(folder, tensors)


@pytest.mark.parametrize("group", [32, 64])
def test_scales_of_smaller_groups_are_refused(checkpoints: dict[str, Path], group: int) -> None:
    folder = checkpoints["deepseek"]
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith("weight_scale_inv"):
            tensors[name] = tensor.repeat_interleave(128 // group, 1)
    with pytest.raises(RuntimeError, match="must match the size"):
        stock_layer(folder, tensors)


def test_bf16_linears_are_cast_without_a_word() -> None:
    """All but plain column-parallel ones; the scales stay what the memory held."""
    from sglang.srt.layers import linear as layers
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.srt import cpu_fp8
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    cpu_fp8.install()
    options = {"bias": False, "quant_config": W4AFp8Config(), "params_dtype": torch.bfloat16}
    weight = torch.randn(256, 256, dtype=torch.bfloat16)
    with virtual_rank(0, 1):
        column = layers.ColumnParallelLinear(256, 256, prefix="q_b_proj", **options)
        cast = {
            layers.RowParallelLinear(256, 256, prefix="o_proj", **options): (),
            layers.ReplicatedLinear(256, 256, prefix="q_a_proj", **options): (),
            layers.MergedColumnParallelLinear(256, [256] * 2, prefix="mlp", **options): (0,),
            layers.QKVParallelLinear(256, 128, 2, 2, prefix="qkv_proj", **options): ("q",),
        }
    with pytest.raises(ValueError, match="Downcasting not allowed"):
        column.weight.weight_loader(column.weight, weight)
    for layer, shard in cast.items():
        layer.weight.weight_loader(layer.weight, weight, *shard)
        assert torch.equal(layer.weight[:256].float(), weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("model", ["deepseek", "qwen"])
@pytest.mark.parametrize("style", ["config.json", "hf_quant_config.json"])
def test_detection(checkpoints: dict[str, Path], tmp_path: Path, model: str, style: str) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoints[model].iterdir():
        (folder / file.name).symlink_to(file)
    if style == "hf_quant_config.json":
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    assert ModelConfig(str(folder))._parse_quant_hf_config()["quant_method"] == "w4afp8"


def test_inspect_says_what_stock_sglang_can_serve(checkpoints: dict[str, Path]) -> None:
    assert inspect_checkpoint(str(checkpoints["deepseek"])).stock_sglang == []
    # Its linears are BF16, which SGLang's config class cannot express.
    reasons = inspect_checkpoint(str(checkpoints["qwen"])).stock_sglang
    assert any("not FP8" in reason for reason in reasons)
