"""What convert makes of sources that are mixed, unusual or impossible."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.checkpoint.index import INDEX_NAME
from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.testing.checkpoints import (
    MoeShape,
    bytes_of_files,
    float_weights,
    is_quantised_linear,
    model_config,
    tensors_of,
    to_fp8_blocks,
    write_checkpoint,
    write_fp8,
)
from sglang_w4afp8.tools.convert import convert_checkpoint
from sglang_w4afp8.tools.verify import verify_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def pack_quantized(tmp_path, linear_scale):
    """INT4 experts and FP8 linears as compressed-tensors stores them.

    ``linear_scale`` makes the FP8 weight and its scale of one linear.
    """
    tensors = {}
    for name, weight in float_weights(MoeShape()).items():
        prefix = name.removesuffix(".weight")
        if ".experts." in name:
            codes = (weight * 100).round().clamp(-8, 7).to(torch.int8)
            words = pack_int4(codes).view(torch.uint8).bitwise_xor(0x88).view(torch.int32)
            tensors[f"{prefix}.weight_packed"] = words
            tensors[f"{prefix}.weight_scale"] = torch.ones(weight.shape[0], 8).to(torch.bfloat16)
            tensors[f"{prefix}.weight_shape"] = torch.tensor(weight.shape)
        elif is_quantised_linear(name):
            tensors[name], tensors[f"{name}_scale"] = linear_scale(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    quant = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*gate"]}
    return write_checkpoint(tmp_path / "src", tensors, model_config(MoeShape(), quant)), tensors


def test_compressed_tensors_mixture(tmp_path):
    source, before = pack_quantized(tmp_path, to_fp8_blocks)
    report = convert_checkpoint(source, tmp_path / "dst")
    assert report.group_size == 32
    assert report.formats == {"pack-quantized": 24}
    assert report.tensors_rounded == 0
    after = tensors_of(tmp_path / "dst")
    # Block-FP8 scales get the name that the linears' loader knows; nothing else changes.
    scale = "model.layers.0.self_attn.o_proj.weight_scale"
    assert scale not in after
    assert torch.equal(after[f"{scale}_inv"], before[scale])
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert section["weight_block_size"] == [128, 128]
    assert "lm_head" in section["modules_to_not_convert"]
    assert not any(name.startswith("re:") for name in section["modules_to_not_convert"])
    assert section["producer"]["method"] == "taken over exactly"
    verified = verify_checkpoint(source, tmp_path / "dst")
    assert verified.is_good, verified.problems
    assert verified.overall_snr_db == 999.0


def per_channel(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def per_tensor(weight):
    scale = (weight.abs().amax() / 448).reshape(1)
    return (weight / scale).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("kind", [per_channel, per_tensor])
def test_linears_without_block_scales_are_refused(tmp_path, kind):
    source, _ = pack_quantized(tmp_path, kind)
    with pytest.raises(CheckpointError, match="per-channel or per-tensor"):
        convert_checkpoint(source, tmp_path / "dst")


def test_models_without_experts(tmp_path):
    source = write_checkpoint(tmp_path / "src", {"lm_head.weight": torch.zeros(2, 2)}, {}, shards=1)
    with pytest.raises(CheckpointError, match="no routed experts"):
        convert_checkpoint(source, tmp_path / "dst")


def test_fused_experts_are_refused(tmp_path):
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 4, 4)}
    source = write_checkpoint(tmp_path / "src", tensors, {}, shards=1)
    with pytest.raises(CheckpointError, match="one tensor"):
        convert_checkpoint(source, tmp_path / "dst")


def test_int4_linears_are_refused(tmp_path):
    weights = {n: w.to(torch.bfloat16) for n, w in float_weights(MoeShape()).items()}
    weights["model.layers.0.self_attn.o_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    source = write_checkpoint(tmp_path / "src", weights, model_config(MoeShape()))
    with pytest.raises(CheckpointError, match="INT4 too"):
        convert_checkpoint(source, tmp_path / "dst")


def edit_index(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = source / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(source: Path, shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def corrupt_header(source: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dtyp!"', 1))


def remove(source: Path, shard: Path) -> None:
    shard.unlink()


def name_no_tensor(source: Path, shard: Path) -> None:
    edit_index(source, lambda places: places.update({"ghost.weight": shard.name}))


def store_twice(source: Path, shard: Path) -> None:
    save_file({**load_file(shard), "model.embed_tokens.weight": torch.zeros(1)}, shard)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated"),
        (corrupt_header, "unreadable header"),
        (remove, "does not exist"),
        (name_no_tensor, "ghost.weight"),
        (store_twice, "both copies"),
    ],
)
def test_damaged_sources_are_refused_before_anything_is_written(tmp_path, damage, words):
    source = write_fp8(tmp_path / "src", MoeShape(128, 128, 2), shards=3)
    damage(source, source / "model-00003-of-00003.safetensors")
    before = bytes_of_files(source)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert_checkpoint(source, tmp_path / "dst")
    assert "(1)" in str(caught.value)
    assert not (tmp_path / "dst").exists()
    assert bytes_of_files(source) == before


def test_tensors_that_the_index_lacks_are_converted_too(tmp_path):
    source = write_fp8(tmp_path / "src", MoeShape(128, 128, 2), shards=3)
    convert_checkpoint(source, tmp_path / "straight")
    lost = "model.layers.1.mlp.experts.1.up_proj.weight"
    edit_index(source, lambda places: places.pop(lost))
    report = convert_checkpoint(source, tmp_path / "dst")
    assert any(lost in note for note in report.notes)
    assert bytes_of_files(tmp_path / "dst") == bytes_of_files(tmp_path / "straight")


def test_the_rounding_table_of_the_docs_is_the_measured_one():
    path = ROOT / "benchmarks" / "rounding_snr.py"
    spec = importlib.util.spec_from_file_location("rounding_snr", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = json.loads((ROOT / "benchmarks/results/rounding_snr.json").read_text())["rows"]
    table = script.markdown([row for row in rows if row["source"] == "fp8"])
    assert table in (ROOT / "docs" / "convert.md").read_text()
    # One row is computed again: the file is what this code gives, not an older one.
    fresh = [row for row in script.table("fp8", ("Student t5",)) if row["group_size"] == 128]
    stored = [r for r in rows if r["weights"] == "Student t5" and r["source"] == "fp8"]
    for label in script.METHODS:
        assert fresh[0][label] == pytest.approx(stored[0][label], abs=0.02)
