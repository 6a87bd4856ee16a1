from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.packing import has_minus_eight, unpack_int4
from sglang_w4afp8.quantize.fp8 import (
    apply_block_scale,
    decode_e4m3,
    has_nan_e4m3,
    resize_block_scale,
)
from sglang_w4afp8.quantize.groups import resize_group_scale
from sglang_w4afp8.quantize.metrics import LOSSLESS_DB, ErrorStats
from sglang_w4afp8.quantize.mse import quantize_mse
from sglang_w4afp8.quantize.rtn import quantize_rtn
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.reference import dequantize_fp8_block, dequantize_int4
from sglang_w4afp8.testing.checkpoints import to_fp8_blocks

FP8 = torch.float8_e4m3fn


def student(freedom: float, *size: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(freedom).sample(size)


def snr(reference: torch.Tensor, value: torch.Tensor) -> float:
    return ErrorStats.compare(reference, value).snr_db


def test_every_e4m3_value_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = ~codes.to(torch.float32).isnan()
    assert torch.equal(decode_e4m3(codes).isnan(), ~finite)
    assert torch.equal(decode_e4m3(codes[finite]), codes.to(torch.float32)[finite])
    # −0 stays −0: codes are copied on, not only compared.
    signs = codes.to(torch.float32)[finite].signbit()
    assert torch.equal(decode_e4m3(codes[finite]).signbit(), signs)
    assert has_nan_e4m3(codes)
    assert not has_nan_e4m3(codes[finite])
    assert not has_nan_e4m3(torch.empty(0, dtype=FP8))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 90), n=st.sampled_from([1, 16, 32]),
       k=st.sampled_from([16, 32, 90]), first=st.integers(0, 40))  # fmt: skip
def test_block_scales_reach_their_rows(rows, columns, n, k, first):
    torch.manual_seed(rows * 91 + columns)
    total = first + rows
    weight = torch.randn(total, columns).to(FP8)
    scale = torch.rand(-(-total // n), -(-columns // k)) + 0.1
    expected = dequantize_fp8_block(weight, scale, (n, k), torch.float32)[first:]
    got = apply_block_scale(decode_e4m3(weight[first:]), scale, (n, k), first)
    assert torch.equal(got, expected)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), e8m0=st.booleans(),
       new=st.sampled_from([(64, 64), (32, 128), (128, 128), (1, 1)]))  # fmt: skip
def test_smaller_blocks_change_no_value(rows, columns, e8m0, new):
    torch.manual_seed(rows * 301 + columns)
    weight, scale = to_fp8_blocks(torch.randn(rows, columns), power_of_two=e8m0)
    resized = resize_block_scale(scale, (rows, columns), (128, 128), new)
    assert resized.dtype == scale.dtype
    assert resized.shape == (-(-rows // new[0]), -(-columns // new[1]))
    before = dequantize_fp8_block(weight, scale.float(), (128, 128), torch.float32)
    after = dequantize_fp8_block(weight, resized.float(), new, torch.float32)
    assert torch.equal(before, after)


def test_blocks_cannot_grow():
    with pytest.raises(CheckpointError, match="divisor"):
        resize_block_scale(torch.ones(2, 2), (128, 128), (64, 64), (128, 128))
    with pytest.raises(CheckpointError, match="divisor"):
        resize_block_scale(torch.ones(1, 1), (128, 128), (128, 128), (48, 64))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), new=st.sampled_from([128, 64, 32]))
def test_smaller_groups_change_no_value(rows, groups, new):
    torch.manual_seed(rows + groups)
    packed = torch.randint(-128, 128, (rows, groups * 64), dtype=torch.int8)
    scale = torch.randn(rows, groups).to(torch.bfloat16)
    resized = resize_group_scale(scale, 128, new)
    before = dequantize_int4(packed, scale, 128, torch.float32)
    assert torch.equal(before, dequantize_int4(packed, resized, new, torch.float32))


def test_groups_cannot_grow():
    with pytest.raises(ConfigError, match="divisor"):
        resize_group_scale(torch.ones(1, 4), 64, 128)


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8])
def test_result_has_the_format_and_the_reported_error(method, group_size, dtype):
    torch.manual_seed(1)
    weight = torch.randn(96, 512)
    scale = block = None
    if dtype == FP8:
        weight, scale = to_fp8_blocks(weight)
        block = (128, 128)
        restored_source = dequantize_fp8_block(weight, scale, block, torch.float32)
    else:
        weight = weight.to(dtype)
        restored_source = weight.to(torch.float32)
    packed, scales, stats = quantize_weight(
        weight, scale, block, method=method, group_size=group_size
    )
    assert packed.shape == (96, 256)
    assert packed.dtype == torch.int8
    assert scales.shape == (96, 512 // group_size)
    assert scales.dtype == torch.bfloat16
    if method == "rtn":
        assert (scales > 0).all()
        assert not has_minus_eight(packed)
    value = dequantize_int4(packed, scales, group_size, torch.float64)
    truth = ErrorStats.compare(restored_source, value)
    assert stats.count == weight.numel()
    assert stats.snr_db == pytest.approx(truth.snr_db, abs=1e-3)
    assert stats.cosine == pytest.approx(truth.cosine, abs=1e-6)
    assert 15 < stats.snr_db < 30


def test_rtn_is_absmax_over_seven():
    weight = torch.tensor([[0.0, 0.5, -1.0, 7.0] * 32])
    packed, scales, stats = quantize_weight(weight, method="rtn", group_size=128)
    assert scales.tolist() == [[1.0]]
    # 0.5 rounds to even, as torch and every kernel's conversion do.
    assert unpack_int4(packed)[0, :4].tolist() == [0, 0, -1, 7]
    assert stats.error == pytest.approx(32 * 0.25)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_codes_are_those_of_the_rounded_scale(method):
    # Codes must fit the BF16 scale that is stored, not the exact one it was rounded from.
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    packed, scales, _ = quantize_weight(weight, method=method)
    exact = weight.double().view(64, 2, 128) / scales.double().unsqueeze(-1)
    codes = unpack_int4(packed, torch.float64).view(64, 2, 128)
    low = -7 if method == "rtn" else -8
    inside = (exact > low) & (exact < 7)
    assert (exact - codes)[inside].abs().max() <= 0.5 + 1e-5
    assert ((codes == 7) | (codes == low))[~inside].all()


def test_mse_never_loses_to_rtn_in_any_group():
    weight = student(5.0, 512, 128)
    groups = weight.view(512, 1, 128)
    for symmetric in (False, True):
        codes, scale = quantize_mse(groups, symmetric=symmetric)
        searched = (groups - codes * scale.unsqueeze(-1)).square().sum(-1)
        codes, scale = quantize_rtn(groups)
        plain = (groups - codes * scale.unsqueeze(-1)).square().sum(-1)
        # BF16 rounding of the winner's scale may cost a trace.
        assert (searched <= plain * 1.001).all()


@pytest.mark.parametrize("freedom", [3.0, 5.0])
def test_searched_scales_gain_on_heavy_tails(freedom):
    weight = student(freedom, 512, 1024)
    results = {}
    for name, options in {
        "rtn": {"method": "rtn"},
        "mse": {"method": "mse"},
        "symmetric": {"method": "mse", "symmetric": True},
    }.items():
        packed, scales, _ = quantize_weight(weight, **options)
        results[name] = snr(weight, dequantize_int4(packed, scales, 128, torch.float32))
    assert results["mse"] - results["rtn"] > 1.5
    # No choice of scales exceeds 1.0 dB with fifteen codes: see benchmarks/rounding_snr.py.
    assert 0.6 < results["symmetric"] - results["rtn"] < 0.95


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_close_to_an_exhaustive_one(symmetric):
    weight = student(5.0, 64, 128)
    best = torch.full((64,), float("inf"))
    low, signs = (-7, (1,)) if symmetric else (-8, (1, -1))
    for step in range(1, 2000):
        for sign in signs:
            scale = weight.abs().amax(-1, keepdim=True) * sign * step / 2000 / 3
            codes = (weight / scale).round().clamp(low, 7)
            best = torch.minimum(best, (weight - codes * scale).square().sum(-1))
    codes, scale = quantize_mse(weight.view(64, 1, 128), symmetric=symmetric)
    found = (weight.view(64, 1, 128) - codes * scale.unsqueeze(-1)).square().sum((-1, -2))
    assert 10 * torch.log10(found.sum() / best.sum()) < 0.05  # dB


def test_the_sixteenth_code_and_negative_scales():
    packed, scales, _ = quantize_weight(student(5.0, 64, 256))
    assert has_minus_eight(packed)
    assert (scales < 0).any()
    assert (scales > 0).any()
    packed, scales, _ = quantize_weight(student(5.0, 64, 256), symmetric=True)
    assert not has_minus_eight(packed)
    assert (scales > 0).all()


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_zero_groups_are_harmless(method):
    weight = torch.zeros(4, 256)
    weight[:, 128:] = torch.randn(4, 128)
    packed, scales, stats = quantize_weight(weight, method=method)
    assert (scales[:, 0] == 1).all()
    assert (unpack_int4(packed)[:, :128] == 0).all()
    assert stats.zero_groups == 4
    assert not dequantize_int4(packed, scales, 128, torch.float32).isnan().any()


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_tiny_and_huge_weights(method):
    weight = torch.randn(4, 128) * torch.tensor([[1e-30], [1e-10], [1e10], [1e15]])
    packed, scales, _ = quantize_weight(weight.to(torch.bfloat16), method=method)
    value = dequantize_int4(packed, scales, 128, torch.float64)
    for row in range(4):
        assert snr(weight[row], value[row]) > 15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_non_finite_weights_are_refused(bad, method):
    weight = torch.randn(8, 128)
    weight[3, 5] = bad
    with pytest.raises(CheckpointError, match=r"experts\.0"):
        quantize_weight(weight, method=method, name="experts.0")


def test_fp8_nan_is_refused():
    weight = torch.randn(8, 128).to(FP8)
    weight.view(torch.uint8)[2, 2] = 0xFF
    with pytest.raises(CheckpointError, match="NaN"):
        quantize_weight(weight, torch.ones(1, 1), (128, 128))


def test_ragged_groups_are_refused_with_the_size_that_fits():
    with pytest.raises(ConfigError, match="--group-size 64"):
        quantize_weight(torch.randn(2, 192))


def test_result_does_not_depend_on_threads():
    weight = student(5.0, 300, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(quantize_weight(weight)[:2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_metrics():
    assert ErrorStats.compare(torch.ones(3), torch.ones(3)).snr_db == LOSSLESS_DB
    stats = ErrorStats.compare(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    assert stats.snr_db == pytest.approx(20.0)
    total = ErrorStats()
    total.add(stats)
    total.add(stats)
    assert total.count == 4
    assert total.snr_db == pytest.approx(20.0)
    assert ErrorStats.compare(torch.zeros(2), torch.ones(2)).snr_db == -LOSSLESS_DB
