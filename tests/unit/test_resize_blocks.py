from __future__ import annotations

import json

import pytest
import torch

from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.reference import dequantize_fp8_block, dequantize_int4
from sglang_w4afp8.testing.checkpoints import MoeShape, tensors_of, write_bf16, write_fp8
from sglang_w4afp8.tools.convert import convert_checkpoint
from sglang_w4afp8.tools.resize_blocks import default_target, resize_checkpoint


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_dequantisation_is_bit_identical(tmp_path, power_of_two, apart):
    # The dense layer has 256 + 64 rows: its last block is ragged.
    source = write_fp8(tmp_path / "m", power_of_two=power_of_two, scales_apart=apart)
    report = resize_checkpoint(source)
    target = tmp_path / "m-Block64x64"
    assert report.target == str(target)
    before, after = tensors_of(source), tensors_of(target)
    assert set(before) == set(after)
    resized = 0
    for name, tensor in before.items():
        if name.endswith("_scale_inv"):
            weight = before[name.removesuffix("_scale_inv")]
            small = after[name]
            assert small.dtype == tensor.dtype
            one = dequantize_fp8_block(weight, tensor.float(), (128, 128), torch.float32)
            two = dequantize_fp8_block(weight, small.float(), (64, 64), torch.float32)
            assert torch.equal(one, two)
            resized += 1
        else:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
    assert report.resized == resized
    ragged = after["model.layers.0.mlp.gate_proj.weight_scale_inv"]
    assert ragged.shape == (5, 4)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [64, 64]
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert (target / "tokenizer.json").is_file()


def test_int4_groups(tmp_path):
    source = write_fp8(tmp_path / "src")
    convert_checkpoint(source, tmp_path / "w4")
    report = resize_checkpoint(tmp_path / "w4", group_size=64)
    target = tmp_path / "w4-Group64"
    assert report.group_size == (128, 64)
    before, after = tensors_of(tmp_path / "w4"), tensors_of(target)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert torch.equal(
        dequantize_int4(before[name], before[name + "_scale_inv"], 128, torch.float32),
        dequantize_int4(after[name], after[name + "_scale_inv"], 64, torch.float32),
    )
    section = json.loads((target / "config.json").read_text())["quantization_config"]
    assert section["group_size"] == 64
    assert section["weight_block_size"] == [128, 128]
    # The manifest of the conversion is replaced, its card and everything else is kept.
    assert (target / "README.md").is_file()
    assert (target / "hf_quant_config.json").is_file()


def test_both_at_once(tmp_path):
    convert_checkpoint(write_fp8(tmp_path / "src"), tmp_path / "w4")
    report = resize_checkpoint(tmp_path / "w4", tmp_path / "both", block=64, group_size=32)
    assert report.block == ([128, 128], [64, 64])
    assert report.group_size == (128, 32)
    section = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    assert section["weight_block_size"] == [64, 64]
    assert section["group_size"] == 32


def test_old_style_checkpoints_get_a_config_section(tmp_path):
    convert_checkpoint(write_fp8(tmp_path / "src"), tmp_path / "w4")
    path = tmp_path / "w4" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    resize_checkpoint(tmp_path / "w4", tmp_path / "dst", group_size=64)
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert section == {
        "quant_method": "w4afp8",
        "moe_activation_scheme": "static",
        "group_size": 64,
    }


def test_sizes_that_do_not_divide(tmp_path):
    source = write_fp8(tmp_path / "src")
    with pytest.raises(ConfigError, match="divisor"):
        resize_checkpoint(source, block=48)
    convert_checkpoint(source, tmp_path / "g64", group_size=64)
    with pytest.raises(ConfigError, match="--requantize"):
        resize_checkpoint(tmp_path / "g64", group_size=128)


def test_nothing_to_resize(tmp_path):
    source = write_bf16(tmp_path / "src", MoeShape(layers=2))
    with pytest.raises(CheckpointError, match="--block 64"):
        resize_checkpoint(source)
    with pytest.raises(CheckpointError, match="--group-size 64"):
        resize_checkpoint(source, group_size=64)
    assert not default_target(source, 64, None).exists()


def test_dry_run_and_repetition(tmp_path):
    source = write_fp8(tmp_path / "src")
    planned = resize_checkpoint(source, dry_run=True)
    assert not (tmp_path / "src-Block64x64").exists()
    done = resize_checkpoint(source)
    assert planned.output_bytes == done.output_bytes
    again = resize_checkpoint(source)
    assert any("nothing was done" in note for note in again.notes)
