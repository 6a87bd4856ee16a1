from __future__ import annotations

import pytest
import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Int4Weight, detect
from sglang_w4afp8.checkpoint.gptq import unpack_words
from sglang_w4afp8.checkpoint.index import DTYPE_NAMES, TensorEntry
from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import dequantize_int4

PREFIX = "model.layers.1.mlp.experts.0.gate_proj"
N, K = 24, 256


def bundle(tensors, quant=None):
    """Parts and a reader over tensors in memory."""
    parts = {
        part: TensorEntry(
            f"{PREFIX}.{part}", DTYPE_NAMES[t.dtype], tuple(t.shape), "f", 0, t.nbytes
        )
        for part, t in tensors.items()
    }

    def read(entry):
        return tensors[entry.name.removeprefix(f"{PREFIX}.")]

    return ExpertParts(PREFIX, parts, quant or {}), read


def load(tensors, quant=None):
    parts, read = bundle(tensors, quant)
    source = detect(parts)
    assert source.shape(parts) == (N, K)
    return source, parts, source.load(parts, read)


@pytest.fixture
def codes():
    torch.manual_seed(0)
    return torch.randint(-8, 8, (N, K), dtype=torch.int8)


def words_along(values, axis):
    """Pack unsigned nibbles into int32 words along an axis, element i at bits 4i: the slow way."""
    values = values.to(torch.int64).movedim(axis, -1)
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for i in range(8):
        words |= values[..., i::8] << (4 * i)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return words.movedim(-1, axis).contiguous()


def scales_of(groups):
    torch.manual_seed(1)
    return (torch.rand(N, groups) + 0.5).to(torch.bfloat16)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_pack_quantized_is_exact(codes, group):
    scale = scales_of(K // group)
    source, parts, weight = load(
        {
            "weight_packed": words_along(codes + 8, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor([N, K]),
        }
    )
    assert source.name == "pack-quantized"
    assert source.group_size(parts) == group
    assert isinstance(weight, Int4Weight)
    assert torch.equal(weight.packed, pack_int4(codes))
    assert torch.equal(weight.scale, scale)


def test_pack_quantized_agrees_with_compressed_tensors(codes):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = helpers.pack_to_int32(codes, 4)
    _, _, weight = load(
        {
            "weight_packed": packed,
            "weight_scale": scales_of(2),
            "weight_shape": torch.tensor([N, K]),
        }
    )
    assert torch.equal(weight.packed, pack_int4(codes))


def test_pack_quantized_with_zero_points_or_order_is_not_exact(codes):
    scale = scales_of(2)
    zero = torch.randint(0, 16, (N, 2))
    tensors = {
        "weight_packed": words_along(codes + 8, 1),
        "weight_scale": scale,
        "weight_zero_point": words_along(zero, 0),
    }
    source, parts, weight = load(tensors)
    assert "asymmetric" in source.inexact(parts)
    assert source.group_size(parts) is None
    assert isinstance(weight, FloatWeight)
    expected = (
        codes.float() - (zero - 8).repeat_interleave(128, 1)
    ) * scale.float().repeat_interleave(128, 1)
    assert torch.allclose(weight.data, expected)
    order = torch.randperm(K) // 128
    del tensors["weight_zero_point"]
    tensors["weight_g_idx"] = order.to(torch.int32)
    source, parts, weight = load(tensors)
    assert "ordering" in source.inexact(parts)
    assert torch.allclose(weight.data, codes.float() * scale.float()[:, order])


def test_padded_pack_quantized_is_refused(codes):
    parts, read = bundle(
        {
            "weight_packed": words_along(codes + 8, 1),
            "weight_scale": scales_of(2),
            "weight_shape": torch.tensor([N, K - 4]),
        }
    )
    with pytest.raises(CheckpointError, match="weight_shape"):
        detect(parts).load(parts, read)


def test_other_bit_widths_are_refused(codes):
    quant = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    parts, _ = bundle({"weight_packed": words_along(codes + 8, 1), "weight_scale": scales_of(2)},
                      quant)  # fmt: skip
    with pytest.raises(CheckpointError, match="8-bit"):
        detect(parts).shape(parts)


def gptq(codes, zeros, group, stored_offset, g_idx=None):
    scale = scales_of(K // group).to(torch.float16).t().contiguous()
    index = torch.arange(K) // group if g_idx is None else g_idx
    return {
        "qweight": words_along((codes + 8).t(), 0),
        "qzeros": words_along((zeros - stored_offset).t(), 1),
        "scales": scale,
        "g_idx": index.to(torch.int32),
    }


@pytest.mark.parametrize(("version", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("group", [32, 128])
def test_symmetric_gptq_is_exact(codes, version, offset, group):
    tensors = gptq(codes, torch.full((N, K // group), 8), group, offset)
    quant = {
        "quant_method": "gptq",
        "bits": 4,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": version,
    }
    source, parts, weight = load(tensors, quant)
    assert source.name == "gptq"
    assert source.group_size(parts) == group
    assert torch.equal(weight.packed, pack_int4(codes))
    assert torch.equal(weight.scale, tensors["scales"].t().to(torch.bfloat16))


def test_gptq_that_breaks_its_promise_is_refused(codes):
    quant = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
    zeros = torch.full((N, 2), 8)
    zeros[3, 1] = 7
    parts, read = bundle(gptq(codes, zeros, 128, 1), quant)
    with pytest.raises(CheckpointError, match="qzeros"):
        detect(parts).load(parts, read)
    permuted = gptq(codes, torch.full((N, 2), 8), 128, 1, torch.randperm(K) // 128)
    parts, read = bundle(permuted, quant)
    with pytest.raises(CheckpointError, match="g_idx"):
        detect(parts).load(parts, read)


def test_asymmetric_or_permuted_gptq_is_unpacked(codes):
    zeros = torch.randint(1, 16, (N, 2))
    order = torch.randperm(K) // 128
    tensors = gptq(codes, zeros, 128, 1, order)
    quant = {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": True}
    source, parts, weight = load(tensors, quant)
    assert source.inexact(parts)
    scale = tensors["scales"].t().float()
    assert torch.allclose(weight.data, (codes.float() + 8 - zeros[:, order]) * scale[:, order])


def test_awq_is_unpacked(codes):
    zeros = torch.randint(0, 16, (N, 2))
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values):  # (R, N) unsigned, AWQ's interleaving along N
        values = values.view(values.shape[0], -1, 8)[..., order].flatten(1)
        return words_along(values, 1)

    scale = scales_of(2).to(torch.float16)
    tensors = {
        "qweight": pack((codes + 8).t().contiguous()),
        "qzeros": pack(zeros.t().contiguous()),
        "scales": scale.t().contiguous(),
    }
    source, parts, weight = load(tensors, {"quant_method": "awq", "bits": 4})
    assert source.name == "awq"
    assert "asymmetric" in source.inexact(parts)
    expected = (
        codes.float() + 8 - zeros.repeat_interleave(128, 1)
    ) * scale.float().repeat_interleave(128, 1)
    assert torch.allclose(weight.data, expected)


def test_mxfp4_is_unpacked():
    torch.manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    nibbles = torch.randint(0, 16, (N, K))
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    exponent = torch.randint(120, 130, (N, K // 32), dtype=torch.uint8)
    source, parts, weight = load(
        {"weight": packed.view(torch.int8), "scale": exponent.view(torch.float8_e8m0fnu)}
    )
    assert source.name == "mxfp4"
    assert "integer grid" in source.inexact(parts)
    scale = torch.exp2(exponent.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(weight.data, values[nibbles] * scale)


def test_angelslim_is_a_renaming(codes):
    scale = scales_of(2)
    source, parts, weight = load(
        {
            "qweight": pack_int4(codes),
            "weight_scale.int4": scale,
            "weight_scale": torch.ones(1),
            "input_scale": torch.ones(1),
        },
        {"quant_method": "w4a8_awq"},
    )
    assert source.name == "angelslim"
    assert source.group_size(parts) == 128
    assert torch.equal(weight.packed, pack_int4(codes))
    assert torch.equal(weight.scale, scale)


def test_w4afp8_with_fp32_scales(codes):
    scale = scales_of(2).float()
    source, parts, weight = load({"weight": pack_int4(codes), "weight_scale_inv": scale})
    assert source.name == "w4afp8"
    assert source.group_size(parts) == 128
    value = dequantize_int4(weight.packed, weight.scale, 128, torch.float32)
    assert torch.equal(value, codes.float() * scale.repeat_interleave(128, 1))


@pytest.mark.parametrize(
    ("scale_shape", "declared", "block"),
    [
        ((1, 2), [128, 128], (128, 128)),
        ((1, 2), None, (128, 128)),
        ((N, 1), None, (1, K)),
        ((N,), None, (1, K)),
        ((), None, (N, K)),
        ((1, 4), [64, 64], (64, 64)),
    ],
)
@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_scale", "scale"])
def test_fp8_scales_of_every_kind(scale_shape, declared, block, part):
    torch.manual_seed(0)
    data = torch.randn(N, K).to(torch.float8_e4m3fn)
    tensors = {"weight": data, part: torch.rand(scale_shape)}
    source, _, weight = load(tensors, {"weight_block_size": declared})
    assert source.name == "fp8"
    assert weight.block == block
    assert weight.scale.dim() == 2


def test_fp8_without_or_with_misshapen_scales():
    data = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
    parts, _ = bundle({"weight": data})
    with pytest.raises(CheckpointError, match="weight_scale_inv is missing"):
        detect(parts).shape(parts)
    parts, _ = bundle({"weight": data, "weight_scale_inv": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"need scales of \(1, 2\)|need scales of \[1, 2\]"):
        detect(parts).shape(parts)


def test_unknown_formats_are_named():
    parts, _ = bundle({"weight": torch.zeros(4, 4, dtype=torch.int16)})
    with pytest.raises(CheckpointError, match="I16"):
        detect(parts)


def test_words_are_unpacked_where_they_are():
    """A loader may hand over tensors that are on the GPU already."""
    made = unpack_words(torch.empty(2, 3, dtype=torch.int32, device="meta"))
    assert (made.device.type, tuple(made.shape)) == ("meta", (2, 24))
