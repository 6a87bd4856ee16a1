from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.testing.checkpoints import MoeShape, write_bf16, write_fp8
from sglang_w4afp8.tools.convert import convert_checkpoint
from sglang_w4afp8.tools.inspect import inspect_checkpoint

SHARD = "model-00001-of-00001.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
AMAX = {f"model.layers.{layer}.mlp.experts.{g}": 5.0 for layer in (1, 2) for g in ("w13", "w2")}


@pytest.fixture
def static(tmp_path):
    """A healthy static W4AFP8 checkpoint in one shard, without index."""
    source = write_fp8(tmp_path / "src", shards=1, with_index=False)
    (tmp_path / "amax.json").write_text(json.dumps(AMAX))
    convert_checkpoint(source, tmp_path / "w4", act_scales=tmp_path / "amax.json")
    (tmp_path / "w4" / "model.safetensors.index.json").unlink()
    return tmp_path / "w4"


def edit(folder, change):
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    return inspect_checkpoint(str(folder))


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return inspect_checkpoint(str(folder))


def test_a_healthy_static_checkpoint(static):
    report = inspect_checkpoint(str(static))
    assert report.problems == []
    # Everything stock SGLang wants except the skip list it ignores, which holds nothing it reads.
    assert report.stock_sglang == []
    assert report.kind.startswith("W4AFP8, INT4 g128 experts, static activations, FP8 linears")
    assert report.expert_formats == {"w4afp8": 24}
    assert report.group_sizes == {128: 24}
    assert report.moe_layers == [1, 2]
    assert report.mtp_layers == [2]
    assert report.experts_per_layer == 4
    assert report.input_scales == 24
    rows = {row.name: row for row in report.classes}
    assert rows["experts"].tensors == rows["mtp experts"].tensors == 4 * 3 * 3
    assert sum(row.nbytes for row in report.classes) == report.total_bytes


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_sources_are_described(tmp_path, kind):
    folder = (write_fp8 if kind == "fp8" else write_bf16)(tmp_path / "src")
    report = inspect_checkpoint(str(folder))
    assert report.problems == []
    assert report.expert_formats == {kind: 24}
    assert report.kind == f"{kind} experts"


def test_missing_input_scale(static):
    report = edit(static, lambda t: t.pop(f"{EXPERTS}.0.w1.input_scale"))
    assert any("1 of 24" in p and "input_scale" in p for p in report.problems)


def test_missing_expert(static):
    report = edit(static, lambda t: [t.pop(n) for n in list(t) if f"{EXPERTS}.3.down" in n
                                     or f"{EXPERTS}.3.w2" in n])  # fmt: skip
    assert any("3.down" in problem and "1 of 12" in problem for problem in report.problems)


def test_missing_mtp_layer(static):
    report = edit(static, lambda t: [t.pop(n) for n in list(t) if "layers.2." in n])
    assert any("MTP layer 2" in problem for problem in report.problems)


def test_group_size_that_the_config_denies(static):
    report = edit_config(static, lambda c: c["quantization_config"].update(group_size=64))
    assert any("groups of 128" in problem and "64" in problem for problem in report.problems)


def test_config_of_another_method(static):
    report = edit_config(static, lambda c: c["quantization_config"].update(quant_method="fp8"))
    assert any("quant_method 'fp8'" in problem for problem in report.problems)


def test_config_that_says_nothing(static):
    (static / "hf_quant_config.json").unlink()
    report = edit_config(static, lambda c: c.pop("quantization_config"))
    assert any("unquantised" in problem for problem in report.problems)


def test_old_style_config_is_enough(static):
    report = edit_config(static, lambda c: c.pop("quantization_config"))
    assert report.problems == []


def test_broken_config(static):
    report = edit_config(static, lambda c: c["quantization_config"].update(group_size=48))
    assert any("48" in problem for problem in report.problems)


def set_scale(name, value, dtype=torch.bfloat16):
    return lambda tensors: tensors.update({name: torch.tensor([value], dtype=dtype)})


def test_input_scales_that_stock_cannot_load(static):
    report = edit(static, set_scale(f"{EXPERTS}.0.w1.input_scale", 0.5))
    assert any("gate and up" in line for line in report.stock_sglang)
    report = edit(static, set_scale(f"{EXPERTS}.0.w1.input_scale", 0.0123456, torch.float32))
    assert any("no BF16 numbers" in line for line in report.stock_sglang)
    assert any("differ between the experts" in note for note in report.notes)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_input_scales_nobody_can_use(static, value):
    report = edit(static, set_scale(f"{EXPERTS}.0.w2.input_scale", value))
    assert any("not finite" in problem for problem in report.problems)


def test_fp8_without_scales(tmp_path):
    source = write_fp8(tmp_path / "src", shards=1, with_index=False)
    report = edit(source, lambda t: t.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))
    assert any("no scales" in problem and "o_proj" in problem for problem in report.problems)
    report = edit(source, lambda t: t.pop(f"{EXPERTS}.0.gate_proj.weight_scale_inv"))
    assert any("gate_proj" in problem for problem in report.problems)


def test_what_stock_sglang_cannot_do_is_said(tmp_path):
    shape = MoeShape(model_type="qwen3_moe", mtp=0)
    convert_checkpoint(write_bf16(tmp_path / "src", shape), tmp_path / "w4", group_size=64)
    text = " ".join(inspect_checkpoint(str(tmp_path / "w4")).stock_sglang)
    assert "128 only" in text
    assert "not FP8" in text
    assert "1.0 for every input scale" in text


def test_damaged_files_are_listed_not_raised(static):
    (static / SHARD).write_bytes((static / SHARD).read_bytes()[:-5])
    report = inspect_checkpoint(str(static))
    assert any("truncated" in problem for problem in report.problems)
