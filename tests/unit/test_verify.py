from __future__ import annotations

import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.packing import pack_int4, unpack_int4
from sglang_w4afp8.testing.checkpoints import write_bf16, write_fp8
from sglang_w4afp8.tools.convert import convert_checkpoint
from sglang_w4afp8.tools.resize_blocks import resize_checkpoint
from sglang_w4afp8.tools.verify import verify_checkpoint

NAME = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture
def source(tmp_path):
    return write_fp8(tmp_path / "src", scales_apart=True)


@pytest.fixture
def target(tmp_path, source):
    convert_checkpoint(source, tmp_path / "dst")
    return tmp_path / "dst"


def edit(folder, name, change):
    """Change one tensor of a checkpoint (None removes it)."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            value = change(tensors.pop(name))
            if value is not None:
                tensors[name] = value.contiguous()
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def unindex(folder):
    (folder / "model.safetensors.index.json").unlink()


def test_a_good_conversion(source, target):
    report = verify_checkpoint(source, target)
    assert report.is_good
    assert report.problems == []
    assert report.linears_compared == 24
    made = json.loads((target / "w4afp8-manifest.json").read_text())["quality"]
    assert report.overall_snr_db == pytest.approx(made["overall"]["snr_db"], abs=2e-3)
    assert report.layers[1]["gate"] == pytest.approx(
        made["layers"]["1"]["gate"]["snr_db"], abs=2e-3
    )
    assert len(report.worst) == 20
    assert report.worst[0].name == made["worst"][0]["name"]


def swap_nibbles(weight):
    codes = unpack_int4(weight)
    return pack_int4(codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight", swap_nibbles),
        ("weight", lambda w: w.bitwise_xor(-120)),  # 0x88: the sign convention of other formats
        ("weight", lambda w: w.roll(1, 0)),
        ("weight_scale_inv", lambda s: s.roll(1, -1) * 3),
        ("weight_scale_inv", torch.neg),
    ],
)
def test_wrong_weights_fall_below_the_threshold(source, target, part, change):
    edit(target, f"{NAME}.{part}", change)
    report = verify_checkpoint(source, target)
    assert not report.is_good
    assert report.below_threshold == 1
    assert report.worst[0].name == NAME


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "finite"), (0.0, "zero")])
def test_broken_scales_are_named(source, target, value, words):
    def spoil(scale):
        scale[0, 0] = value
        return scale

    edit(target, f"{NAME}.weight_scale_inv", spoil)
    report = verify_checkpoint(source, target)
    assert not report.is_good
    assert any(NAME in problem and words in problem for problem in report.problems)


def test_changed_copies_are_found(source, target):
    edit(target, "model.norm.weight", lambda w: w + 1)
    report = verify_checkpoint(source, target)
    assert any("model.norm.weight: bytes differ" in problem for problem in report.problems)


def test_other_dtype_of_a_copy_is_found(source, target):
    edit(target, "model.norm.weight", lambda w: w.float())
    assert any("F32" in p for p in verify_checkpoint(source, target).problems)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{NAME}.weight"])
def test_missing_tensors_are_found(source, target, name):
    unindex(target)
    if name.startswith(NAME):
        edit(target, f"{NAME}.weight_scale_inv", lambda _: None)
    edit(target, name, lambda _: None)
    report = verify_checkpoint(source, target)
    assert any(name.removesuffix(".weight") in p and "missing" in p for p in report.problems)


def test_tensors_without_origin_are_found(source, target):
    unindex(target)
    shard = target / "model-00001-of-00003.safetensors"
    save_file({**load_file(shard), "stray.weight": torch.zeros(1)}, shard)
    report = verify_checkpoint(source, target)
    assert any("stray.weight has no origin" in problem for problem in report.problems)


def test_threshold_is_the_users(source, target):
    assert not verify_checkpoint(source, target, threshold_db=40.0).is_good
    assert verify_checkpoint(source, target, threshold_db=40.0).below_threshold == 24


def test_sampling_compares_less_and_says_so(source, target):
    report = verify_checkpoint(source, target, sample=0.4)
    assert 0 < report.linears_compared < 24
    assert any("40%" in note for note in report.notes)
    assert report.is_good
    with pytest.raises(ConfigError):
        verify_checkpoint(source, target, sample=0.0)


def test_workers_find_the_same(source, target, monkeypatch):
    from sglang_w4afp8.tools import verify

    monkeypatch.setattr(verify, "_BATCH_BYTES", 200_000)
    one = verify_checkpoint(source, target)
    two = verify_checkpoint(source, target, workers=2)
    assert one.worst == two.worst
    assert one.layers == two.layers


def test_resized_blocks_are_equal(source, tmp_path):
    resize_checkpoint(source, tmp_path / "b64")
    report = verify_checkpoint(source, tmp_path / "b64")
    assert report.is_good
    # Dense, attention and shared linears are restored too: their scales changed shape.
    assert report.linears_compared > 24
    assert report.overall_snr_db == 999.0
    edit(
        tmp_path / "b64",
        "model.layers.0.self_attn.o_proj.weight_scale_inv",
        lambda s: s * torch.linspace(1, 2, s.numel()).view_as(s),
    )
    bad = verify_checkpoint(source, tmp_path / "b64")
    assert any("o_proj" in problem and "differ" in problem for problem in bad.problems)


def test_kept_and_bf16_layers(tmp_path):
    source = write_bf16(tmp_path / "plain")
    convert_checkpoint(source, tmp_path / "dst", keep=[r"\.1\."], group_size=32)
    report = verify_checkpoint(source, tmp_path / "dst")
    assert report.is_good
    assert report.layers[1]["up"] == 999.0
    assert report.layers[2]["up"] < 30


def test_reports_are_written(source, target, tmp_path):
    verify_checkpoint(source, target, html=tmp_path / "r.html", png=tmp_path / "r.png")
    page = (tmp_path / "r.html").read_text()
    assert "<svg" in page
    assert NAME in page or "experts" in page
    data = (tmp_path / "r.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (2 * 18, 3 * 18)
    start = data.index(b"IDAT") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    assert len(zlib.decompress(data[start : start + length])) == height * (1 + 3 * width)
