from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_w4afp8.checkpoint.act_scales import load_amaxes, round_up_bf16, static_scale
from sglang_w4afp8.checkpoint.index import INDEX_NAME, open_index
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.packing import has_minus_eight, pack_int4
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.reference import dequantize_fp8_block, dequantize_int4
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.testing.checkpoints import (
    MoeShape,
    bytes_of_files,
    float_weights,
    model_config,
    tensors_of,
    write_bf16,
    write_checkpoint,
    write_fp8,
)
from sglang_w4afp8.tools.convert import convert_checkpoint

EXPERTS = "model.layers.1.mlp.experts"
MTP = "model.layers.2.mlp.experts"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def quant_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", ["fp8", "fp8-e8m0", "bf16"])
@pytest.mark.parametrize("layout", ["plain", "scales-apart", "no-index"])
def test_every_tensor_is_accounted_for(tmp_path, kind, layout):
    how = {
        "plain": {},
        "scales-apart": {"scales_apart": True},
        "no-index": {"with_index": False, "shards": 2},
    }[layout]
    if kind == "bf16":
        source = write_bf16(tmp_path / "src", **how)
    else:
        source = write_fp8(tmp_path / "src", power_of_two=kind == "fp8-e8m0", **how)
    report = convert_checkpoint(source, tmp_path / "dst")
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")

    assert report.layers == [1, 2]  # the MTP layer is converted like the others
    assert report.tensors_converted == 2 * 4 * 3
    weights = {name for name in before if ".experts." in name and name.endswith(".weight")}
    expected = {name for name in before if ".experts." not in name}
    expected |= weights | {f"{name}_scale_inv" for name in weights}
    assert set(after) == expected
    for name, tensor in after.items():
        if ".experts." not in name:
            assert tensor.dtype == before[name].dtype
            assert raw(tensor) == raw(before[name]), name
    for name in weights:
        if kind == "bf16":
            truth = before[name].float()
        else:
            scale = before[f"{name}_scale_inv"].float()
            truth = dequantize_fp8_block(before[name], scale, (128, 128), torch.float32)
        scale = after[f"{name}_scale_inv"]
        assert after[name].dtype == torch.int8
        assert scale.dtype == torch.bfloat16
        assert scale.shape == (truth.shape[0], truth.shape[1] // 128)
        value = dequantize_int4(after[name], scale, 128, torch.float32)
        assert ErrorStats.compare(truth, value).snr_db > 14
    assert any(has_minus_eight(after[name]) for name in weights)

    index = json.loads((tmp_path / "dst" / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert not open_index(tmp_path / "dst").notes
    assert (tmp_path / "dst" / "tokenizer.json").is_file()
    assert (tmp_path / "dst" / "chat_template.jinja").is_file()
    assert not list((tmp_path / "dst").glob(".*"))


def test_configs_of_an_fp8_model(tmp_path):
    source = write_fp8(tmp_path / "src")
    convert_checkpoint(source, tmp_path / "dst")
    section = quant_config(tmp_path / "dst")
    spec = QuantSpec.from_dict(section)
    assert spec.group_size == 128
    assert spec.weight_block_size == (128, 128)
    assert spec.moe_activation is ActivationScheme.DYNAMIC_PER_TOKEN
    # What is not FP8 beside the experts is named, so that nobody looks for its scales.
    assert "model.layers.2.eh_proj" in spec.ignored_layers
    assert "model.layers.1.mlp.gate" in spec.ignored_layers
    assert not any("o_proj" in name or "experts" in name for name in spec.ignored_layers)
    assert section["producer"]["codes"] == [-8, 7]
    hf = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())
    assert hf["quantization"] == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}


def test_configs_of_a_bf16_model(tmp_path):
    source = write_bf16(tmp_path / "src")
    convert_checkpoint(source, tmp_path / "dst", group_size=64)
    spec = QuantSpec.from_dict(quant_config(tmp_path / "dst"))
    assert spec.weight_block_size is None
    assert spec.group_size == 64
    assert spec.ignored_layers == ()


def test_old_quantization_sections_are_replaced(tmp_path):
    source = write_bf16(tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = {"quant_method": "compressed-tensors"}
    config["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(source, tmp_path / "dst")
    made = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "compression_config" not in made
    assert made["text_config"] == {}
    assert made["quantization_config"]["quant_method"] == "w4afp8"


@pytest.mark.parametrize(
    ("model_type", "spelling"), [("deepseek_v3", ("w1", "w3", "w2")),
                                 ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))]
)  # fmt: skip
def test_static_scales(tmp_path, model_type, spelling):
    source = write_fp8(tmp_path / "src", MoeShape(model_type=model_type))
    amax = {f"{EXPERTS}.w13": 3.3, f"{EXPERTS}.w2": 0.007, f"{MTP}.w13": 90.0, f"{MTP}.w2": 1.0}
    (tmp_path / "amax.json").write_text(json.dumps({"amax": amax}))
    report = convert_checkpoint(source, tmp_path / "dst", act_scales=tmp_path / "amax.json")
    assert report.activation == "static"
    assert quant_config(tmp_path / "dst")["moe_activation_scheme"] == "static"
    after = tensors_of(tmp_path / "dst")
    for module in (EXPERTS, MTP):
        for expert in range(4):
            gate, up, down = (after[f"{module}.{expert}.{w}.input_scale"] for w in spelling)
            assert gate.dtype == torch.bfloat16
            assert gate.shape == (1,)
            assert torch.equal(gate, up)
            for scale, gemm in ((gate, "w13"), (down, "w2")):
                exact = amax[f"{module}.{gemm}"] / 448
                assert exact <= float(scale) <= exact * (1 + 2**-7)
    assert sum("input_scale" in name for name in after) == 2 * 4 * 3


def test_static_needs_scales_for_every_layer(tmp_path):
    source = write_fp8(tmp_path / "src")
    with pytest.raises(ConfigError, match="--act-scales"):
        convert_checkpoint(source, tmp_path / "dst", activation="static")
    (tmp_path / "amax.json").write_text(json.dumps({f"{EXPERTS}.w13": 3.3, f"{EXPERTS}.w2": 1.0}))
    with pytest.raises(ConfigError, match="layer 2 w13"):
        convert_checkpoint(source, tmp_path / "dst", act_scales=tmp_path / "amax.json")
    with pytest.raises(ConfigError, match="dynamic"):
        convert_checkpoint(
            source, tmp_path / "dst", activation="dynamic", act_scales=tmp_path / "amax.json"
        )
    assert not (tmp_path / "dst").exists()


def test_an_mtp_layer_with_a_decoder_layers_number_is_not_calibrated_as_that_layer(tmp_path):
    config = model_config(MoeShape())
    tensors = {
        name.replace("model.layers.2.", "mtp.layers.1."): tensor
        for name, tensor in float_weights(MoeShape()).items()
    }
    source = write_checkpoint(tmp_path / "src", tensors, config)
    amaxes = tmp_path / "amax.json"
    ours = {f"{EXPERTS}.w13": 3.3, f"{EXPERTS}.w2": 1.0}
    amaxes.write_text(json.dumps(ours))
    with pytest.raises(ConfigError, match=r"mtp\.layers\.1\.mlp\.experts are both layer 1"):
        convert_checkpoint(source, tmp_path / "dst", act_scales=amaxes)
    convert_checkpoint(source, tmp_path / "kept", act_scales=amaxes, keep=["^mtp"])
    scales = {n: float(t) for n, t in tensors_of(tmp_path / "kept").items() if "input_scale" in n}
    assert len(scales) == 4 * 3 and all(name.startswith(EXPERTS) for name in scales)
    amaxes.write_text(json.dumps(ours | {"mtp.layers.1.mlp.experts.w13": 90.0}))
    with pytest.raises(ConfigError, match="counted from 0"):
        convert_checkpoint(source, tmp_path / "dst", act_scales=amaxes, keep=["^mtp"])
    assert not (tmp_path / "dst").exists()
    report = convert_checkpoint(source, tmp_path / "dst", activation="dynamic")
    assert report.tensors_converted == 2 * 4 * 3


def test_amaxes_are_reduced_over_experts_and_projections(tmp_path):
    tensors = {
        f"{EXPERTS}.0.gate_proj.input_quantizer._amax": torch.tensor(2.0),
        f"{EXPERTS}.1.up_proj.input_quantizer._amax": torch.tensor([5.0]),
        f"{EXPERTS}.0.w2.input_scale": torch.tensor([0.5]),
        f"{EXPERTS}.1.w2.input_scale": torch.tensor([0.25]),
    }
    save_file(tensors, tmp_path / "scales.safetensors")
    assert load_amaxes(tmp_path / "scales.safetensors") == {(1, "w13"): 5.0, (1, "w2"): 224.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model.layers.1.mlp.experts.w13": 0.0}', "positive"),
        ('{"model.layers.1.mlp.experts.w13": NaN}', "positive"),
        ('{"something": 1.0}', "no layer and GEMM"),
        ("{}", "no activation scales"),
        ("[", "JSON"),
    ],
)
def test_unusable_amaxes(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        load_amaxes(tmp_path / "a.json")


def test_bf16_rounding_goes_up():
    assert round_up_bf16(1.0) == 1.0
    assert round_up_bf16(1.0 + 2**-20) == 1.0 + 2**-7
    for value in torch.rand(200).double().tolist():
        up = round_up_bf16(value)
        assert up >= value
        assert float(torch.tensor(up).to(torch.bfloat16)) == up
        assert up <= value * (1 + 2**-7)
    assert static_scale(448.0) == 1.0


def test_scales_of_the_source_are_kept(tmp_path):
    weights = float_weights(MoeShape())
    tensors = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        prefix = name.removesuffix(".weight")
        codes = (weight * 100).round().clamp(-8, 7).to(torch.int8)
        tensors[f"{prefix}.qweight"] = pack_int4(codes)
        tensors[f"{prefix}.weight_scale.int4"] = torch.ones(weight.shape[0], 2).to(torch.bfloat16)
        tensors[f"{prefix}.weight_scale"] = torch.ones(1)
        tensors[f"{prefix}.input_scale"] = torch.tensor([0.5])
    source = write_checkpoint(
        tmp_path / "src", tensors, model_config(MoeShape(), {"quant_method": "w4a8_awq"})
    )
    report = convert_checkpoint(source, tmp_path / "dst")
    assert report.activation == "static"
    assert report.formats == {"angelslim": 24}
    after = tensors_of(tmp_path / "dst")
    assert after[f"{EXPERTS}.0.w1.input_scale"].item() == 0.5
    assert torch.equal(
        after[f"{EXPERTS}.0.up_proj.weight"], tensors[f"{EXPERTS}.0.up_proj.qweight"]
    )
    # Taken-over codes may hold −8; the config must say so to kernels that care.
    assert quant_config(tmp_path / "dst")["producer"]["codes"] == [-8, 7]
    assert not any("weight_scale.int4" in name or "qweight" in name for name in after)


def test_group_size_of_an_int4_source_is_kept_or_cut(tmp_path):
    source = write_bf16(tmp_path / "src")
    convert_checkpoint(source, tmp_path / "g64", group_size=64)
    again = convert_checkpoint(tmp_path / "g64", tmp_path / "again")
    assert again.group_size == 64
    finer = convert_checkpoint(tmp_path / "g64", tmp_path / "g32", group_size=32)
    assert finer.group_size == 32
    name = f"{EXPERTS}.0.up_proj.weight"
    values = []
    for folder, group in (("g64", 64), ("again", 64), ("g32", 32)):
        after = tensors_of(tmp_path / folder)
        values.append(dequantize_int4(after[name], after[name + "_scale_inv"], group, torch.float))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    with pytest.raises(ConfigError, match="--requantize"):
        convert_checkpoint(tmp_path / "g64", tmp_path / "g128", group_size=128)
    coarse = convert_checkpoint(tmp_path / "g64", tmp_path / "g128", group_size=128,
                                requantize=True)  # fmt: skip
    assert 14 < coarse.quality["overall"]["snr_db"] < 40


def test_kept_layers_are_bf16(tmp_path):
    source = write_fp8(tmp_path / "src")
    report = convert_checkpoint(source, tmp_path / "dst", keep=[r"\.layers\.2\."])
    assert report.kept == [MTP]
    assert report.layers == [1]
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")
    name = f"{MTP}.1.down_proj.weight"
    truth = dequantize_fp8_block(before[name], before[name + "_scale_inv"], (128, 128), torch.float)
    assert torch.equal(after[name], truth.to(torch.bfloat16))
    assert name + "_scale_inv" not in after
    assert MTP in quant_config(tmp_path / "dst")["modules_to_not_convert"]
    plain = write_bf16(tmp_path / "plain")
    convert_checkpoint(plain, tmp_path / "dst2", keep=[r"\.layers\.2\."])
    assert raw(tensors_of(plain)[name]) == raw(tensors_of(tmp_path / "dst2")[name])


@pytest.mark.parametrize("pattern", ["layers.9", "("])
def test_keep_that_matches_nothing(tmp_path, pattern):
    with pytest.raises(ConfigError, match="--keep"):
        convert_checkpoint(write_bf16(tmp_path / "src"), tmp_path / "dst", keep=[pattern])


def test_the_range_of_codes_is_recorded(tmp_path):
    source = write_bf16(tmp_path / "src")
    full = convert_checkpoint(source, tmp_path / "a")
    symmetric = convert_checkpoint(source, tmp_path / "b", symmetric=True)
    gain = full.quality["overall"]["snr_db"] - symmetric.quality["overall"]["snr_db"]
    assert gain > 0.5
    assert quant_config(tmp_path / "a")["producer"]["codes"] == [-8, 7]
    assert quant_config(tmp_path / "b")["producer"]["codes"] == [-7, 7]
    convert_checkpoint(source, tmp_path / "c", method="rtn")
    assert quant_config(tmp_path / "c")["producer"]["codes"] == [-7, 7]


def test_workers_make_the_same_bytes(tmp_path):
    source = write_fp8(tmp_path / "src", scales_apart=True)
    convert_checkpoint(source, tmp_path / "one")
    convert_checkpoint(source, tmp_path / "two", workers=2)
    assert bytes_of_files(tmp_path / "one") == bytes_of_files(tmp_path / "two")


def test_source_is_never_touched(tmp_path):
    source = write_fp8(tmp_path / "src")
    for path in source.iterdir():
        path.chmod(0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.iterdir()}
    content = bytes_of_files(source)
    convert_checkpoint(source, tmp_path / "dst")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in source.iterdir()} == before
    assert bytes_of_files(source) == content


def test_dry_run_writes_nothing(tmp_path):
    source = write_fp8(tmp_path / "src")
    report = convert_checkpoint(source, tmp_path / "dst", dry_run=True)
    assert not (tmp_path / "dst").exists()
    real = convert_checkpoint(source, tmp_path / "dst")
    assert report.output_bytes == real.output_bytes
    assert real.output_bytes == sum(t.nbytes for t in tensors_of(tmp_path / "dst").values())
    assert report.formats == real.formats


def test_second_run_does_nothing(tmp_path):
    source = write_fp8(tmp_path / "src")
    first = convert_checkpoint(source, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()}
    again = convert_checkpoint(source, tmp_path / "dst")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()} == before
    assert again.quality == first.quality
    assert any("nothing was done" in note for note in again.notes)


def test_manifest_has_the_checksums(tmp_path):
    import hashlib

    convert_checkpoint(write_fp8(tmp_path / "src"), tmp_path / "dst")
    manifest = json.loads((tmp_path / "dst" / "w4afp8-manifest.json").read_text())
    for name, info in manifest["shards"].items():
        data = (tmp_path / "dst" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info["sha256"]
        assert len(data) == info["size_bytes"]
        assert info["sha256"] in (tmp_path / "dst" / "README.md").read_text()


def test_card_of_the_source_is_kept(tmp_path):
    source = write_bf16(tmp_path / "src")
    (source / "README.md").write_text("original")
    (source / "inference").mkdir()
    (source / "inference" / "model.py").write_text("x = 1")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    convert_checkpoint(source, tmp_path / "dst")
    assert (tmp_path / "dst" / "README.source.md").read_text() == "original"
    assert filecmp.cmp(source / "inference/model.py", tmp_path / "dst" / "inference/model.py")
    assert not (tmp_path / "dst" / ".git").exists()
    assert not (tmp_path / "dst" / "pytorch_model.bin").exists()
