"""``bench moe`` without a GPU: inputs, weight formats of the peers, what becomes of failures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sglang_w4afp8.kernels.hopper.plan import Layer, Limits
from sglang_w4afp8.packing import pack_int4, unpack_int4
from sglang_w4afp8.quantize.fp8 import quantize_fp8_block
from sglang_w4afp8.reference import dequantize_fp8_block
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools import bench_moe, bench_run
from sglang_w4afp8.tools.bench_check import expected
from sglang_w4afp8.tools.bench_moe import (
    Call,
    Ceilings,
    Shape,
    random_calls,
    random_weights,
    shape_of,
)
from sglang_w4afp8.tools.bench_peers import Ours

SMALL = Shape("small", 16, 16, 64, 64, 64, 4)


@pytest.mark.parametrize("routing", list(bench_moe.ROUTINGS))
def test_routings_are_what_they_say(routing: str) -> None:
    calls = random_calls(SMALL, 2000, routing, 2, seed=1, device="cpu")
    for call in calls:
        assert call.topk_ids.shape == (2000, 4)
        assert (call.topk_ids.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert twice"
        torch.testing.assert_close(call.topk_weights.sum(dim=1), torch.ones(2000))
        share = torch.bincount(call.topk_ids.flatten(), minlength=16).double() / 2000
        if routing == "uniform":
            assert (share - 4 / 16).abs().max() < 0.04
        elif routing == "hot":
            # Of the tokens that are not sent there, as many choose it as any other expert.
            assert abs(float(share[1]) - (0.3 + 0.7 * 4 / 16)) < 0.04
        else:
            first = torch.bincount(call.topk_ids[:, 0], minlength=16).double() / 2000
            law = torch.arange(1, 17, dtype=torch.float64) ** -1.2
            assert (first.sort(descending=True).values - law / law.sum()).abs().max() < 0.04
    assert not torch.equal(calls[0].topk_ids, calls[1].topk_ids)


def test_ids_of_other_ranks_are_minus_one() -> None:
    call = random_calls(Shape("ep", 4, 16, 64, 64, 64, 4), 500, "uniform", 1, 2, device="cpu")[0]
    assert set(call.topk_ids.unique().tolist()) == {-1, 0, 1, 2, 3}


def test_errors() -> None:
    wanted = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    found = bench_moe.errors(torch.tensor([3.0, 4.0, 0.0, 0.5]), wanted)
    assert found == pytest.approx((0.1, 0.2))
    nothing = torch.zeros(4, dtype=torch.float64)
    assert bench_moe.errors(nothing.float(), nothing) == (0.0, 0.0)
    assert bench_moe.errors(nothing.float() + 1e-9, nothing)[0] > 1
    assert all(e != e for e in bench_moe.errors(torch.full((4,), float("nan")), wanted))


def test_shapes() -> None:
    assert shape_of("r1-tp8").inner == 256
    custom = shape_of("experts=8,hidden=512,inner=96,top_k=2,group=32")
    assert (custom.experts, custom.all_experts, custom.inner_group) == (8, 8, 32)
    assert custom.name == "custom-8-512-96"
    for words in ("r1-tp9", "experts=8", "experts=8,hidden=5,inner=3,top_k=x", "a=1,b"):
        with pytest.raises(ValueError, match="is none of"):
            shape_of(words)


def test_rows_of_ours_say_which_path(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours()
    limits = Limits(8, 64, 700)
    ours._layer = Layer(256, 7168, 256, 128, 128, 8, False, False, limits)
    card = argparse.Namespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert [ours.path(m) for m in (8, 64, 65, 701)] == ["small", "medium", "large", "prefill"]


@pytest.mark.parametrize("block", [(128, 128), (64, 64)])
def test_block_fp8(block: tuple[int, int]) -> None:
    values = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    values[:64, :64] = 0
    values[:64, 64:128] *= 1e-4
    codes, scale = quantize_fp8_block(values, block)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (256 // block[0], 384 // block[1])
    back = dequantize_fp8_block(codes, scale, block, torch.float32)
    # Half a step of E4M3: 2⁻⁴ of the value, or half of the smallest subnormal.
    per_value = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    bound = torch.maximum(values.abs() * 2.0**-4, per_value * 2.0**-10) * 1.0001
    assert ((back - values).abs() <= bound).all()
    blocks = codes.float().abs().view(256 // block[0], block[0], 384 // block[1], block[1])
    largest = blocks.amax(dim=(1, 3))
    assert ((largest == 448) | (largest == 0)).all()


def test_offset_words() -> None:
    from sglang_w4afp8.srt.peers.flashinfer import up_first
    from sglang_w4afp8.srt.peers.marlin import gptq_words, offset_words

    codes = torch.randint(-8, 8, (2, 6, 32), generator=torch.Generator().manual_seed(0))
    words = offset_words(pack_int4(codes))
    assert words.shape == (2, 6, 4) and words.dtype == torch.int32
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(-2)
    assert torch.equal(nibbles - 8, codes.int())
    assert torch.equal(gptq_words(pack_int4(codes)), words.transpose(1, 2))
    assert torch.equal(up_first(codes), codes[:, [3, 4, 5, 0, 1, 2]])


def test_fp8_experts_are_the_dequantised_ones() -> None:
    from sglang_w4afp8.reference import dequantize_int4
    from sglang_w4afp8.srt.peers.fp8 import fp8_experts

    g = torch.Generator().manual_seed(0)
    packed = pack_int4(torch.randint(-7, 8, (2, 128, 256), generator=g))
    scales = (torch.rand(2, 128, 2, generator=g) + 0.5).bfloat16()
    weight, factors = fp8_experts(packed, scales, 128, 64)
    assert factors.shape == (2, 2, 4)
    wanted = dequantize_int4(packed, scales, 128, torch.float32)
    found = dequantize_fp8_block(weight, factors, (64, 64), torch.float32)
    relative = (found - wanted).norm() / wanted.norm()
    assert 0.005 < relative < 0.04


@pytest.mark.parametrize("codes", [15, 16])
def test_random_weights_use_the_codes_asked_for(codes: int) -> None:
    shape = replace(SMALL, group=32)
    weights = random_weights(shape, ActivationScheme.STATIC, 0, codes, device="cpu")
    for packed in (weights.w13, weights.w2):
        found = unpack_int4(packed).unique().tolist()
        assert found == list(range(-7 if codes == 15 else -8, 8))
    for scale in (weights.w13_scale, weights.w2_scale):
        assert bool((scale < 0).any()) == (codes == 16)


class _Peer:
    """A provider that fails as told: a reason, an exception at some M, or wrong numbers."""

    tolerance = 1e-2

    def __init__(self, name: str, how: str = "", fails_at: int = 4) -> None:
        self.name, self.how, self.fails_at = name, how, fails_at

    def judged_by(self, scheme: ActivationScheme) -> ActivationScheme:
        return scheme

    def why_not(self, problem: Any) -> str | None:
        return "not on this card" if self.how == "reason" else None

    def prepare(self, *_: Any) -> Callable[..., torch.Tensor]:
        if self.how == "prepare":
            raise ImportError("no such  name\nin that library")

        def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            if self.how == "run" and x.shape[0] == self.fails_at:
                raise RuntimeError(f"M = {self.fails_at} is not built")
            out = x * 2
            if self.how == "wrong":
                out[0, 0] = float("nan")
            return out

        return run


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch) -> bench_run.Measurement:
    monkeypatch.setattr(bench_run, "random_weights", lambda *_: None)
    monkeypatch.setattr(Shape, "problem", lambda *_: None)
    monkeypatch.setattr(bench_run, "call_count", lambda *_: 2)
    calls = bench_run.random_calls
    monkeypatch.setattr(bench_run, "random_calls", lambda *a, **k: calls(*a, **k, device="cpu"))

    def expected(_: object, call: Call, scheme: object) -> torch.Tensor:
        return call.x.double() * 2

    monkeypatch.setattr(bench_run, "oracle", expected)
    monkeypatch.setattr(bench_run, "graph_times_us", lambda body, *_: [float(len(body()))] * 3)
    monkeypatch.setattr(bench_run.gc, "collect", lambda: 0)  # 0.4 s each, for nothing here
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    options = argparse.Namespace(
        scheme="static", weight_sets=2, tokens=[1, 4], routing=["uniform"], replays=3,
        peer_limit=None, check_only=False, codes=15, check_seconds=2.0,
    )  # fmt: skip
    result = bench_run.Measurement(options, Ceilings(3000.0, 3000.0, 1500.0))
    result.load(SMALL)
    return result


def test_rows(measurement: bench_run.Measurement) -> None:
    rows: list[dict[str, Any]] = []
    for provider in (_Peer("ours"), _Peer("humming-w4a8")):
        measurement.provider(provider, rows)
    assert [(row["provider"], row["m"]) for row in rows] == [
        ("ours", 1), ("ours", 4), ("humming-w4a8", 1), ("humming-w4a8", 4),
    ]  # fmt: skip
    fields = {"us", "spread_us", "gb_s", "tflops", "roofline_us", "error", "max_error", "oracle"}
    assert all(fields <= set(row) for row in rows)
    assert [row["checked_tokens"] for row in rows] == [1, 4, 1, 4]
    assert "times_ours" not in rows[0] and rows[2]["times_ours"] == 1.0
    assert rows[0]["gb_s"] == pytest.approx(rows[0]["weight_bytes"] / rows[0]["us"] / 1e3)


@pytest.mark.parametrize(
    ("how", "reasons"),
    [
        ("reason", ["not on this card"]),
        ("prepare", ["ImportError: no such name in that library"]),
        ("run", [None, "RuntimeError: M = 4 is not built"]),
    ],
)
def test_a_failing_peer_is_a_row(
    measurement: bench_run.Measurement, how: str, reasons: list[str | None]
) -> None:
    rows: list[dict[str, Any]] = []
    measurement.provider(_Peer("marlin-w4a16", how), rows)
    assert [row.get("reason") for row in rows] == reasons
    assert all(bench_run.line(row) for row in rows)
    measurement.provider(_Peer("next"), rows)
    assert "us" in rows[-1]


def test_a_call_that_fails_does_not_end_its_provider(measurement: bench_run.Measurement) -> None:
    rows: list[dict[str, Any]] = []
    measurement.provider(_Peer("deepgemm-fp8", "run", fails_at=1), rows)
    assert [row.get("reason") for row in rows] == ["RuntimeError: M = 1 is not built", None]
    assert "us" in rows[1]


def test_extra_memory_is_what_a_call_takes_beside_its_output(
    measurement: bench_run.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the allocator: each call keeps 1 MB at its first time and peaks 7 MB above."""
    held, peak, seen = 100_000_000, 0, 0

    class Peer(_Peer):
        def prepare(self, *_: Any) -> Callable[..., torch.Tensor]:
            def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
                nonlocal held, peak, seen
                out = x * 2
                seen += 1
                held += out.nbytes + (1_000_000 if seen == 1 else 0)
                peak = max(peak, held + 7_000_000)
                return out

            return run

    def reset() -> None:
        nonlocal peak
        peak = held

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    rows: list[dict[str, Any]] = []
    measurement.provider(Peer("ours"), rows)
    assert [row["extra_mb"] for row in rows] == [pytest.approx(8.0)] * 2


def test_the_oracle_of_a_large_call_in_parts() -> None:
    shape = replace(SMALL, group=32)
    weights = random_weights(shape, ActivationScheme.DYNAMIC_PER_TOKEN, 0, device="cpu")
    call = random_calls(SMALL, 21, "uniform", 1, seed=1, device="cpu")[0]

    def oracle(part: Call) -> torch.Tensor:
        return bench_moe.oracle(weights, part, ActivationScheme.DYNAMIC_PER_TOKEN)

    whole = oracle(call)
    alone = expected(oracle, call, 0.0)
    assert alone.tokens is None and alone.of(whole) is whole
    torch.testing.assert_close(alone.output, whole.float(), rtol=0, atol=0)
    # Time for one of three parts of seven; then for all.
    first = expected(oracle, call, 0.0, part=8)
    assert first.tokens is not None and first.tokens.tolist() == list(range(0, 21, 3))
    torch.testing.assert_close(first.of(whole).float(), first.output, rtol=1e-6, atol=1e-7)
    parts = expected(oracle, call, 1e9, part=8)
    assert parts.tokens is not None and sorted(parts.tokens.tolist()) == list(range(21))
    torch.testing.assert_close(parts.of(whole).float(), parts.output, rtol=1e-6, atol=1e-7)


def test_a_wrong_token_among_the_checked_is_found(
    measurement: bench_run.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement._options, "check_seconds", 0.0)
    monkeypatch.setattr(measurement._options, "tokens", [5000])
    rows: list[dict[str, Any]] = []
    measurement.provider(_Peer("ours"), rows)
    measurement.provider(_Peer("marlin-w4a16", "wrong"), rows)
    assert [row["checked_tokens"] for row in rows] == [1667, 1667]
    assert [row["wrong"] for row in rows] == [False, True]


def test_large_calls_are_few_in_a_graph() -> None:
    tp8 = shape_of("r1-tp8")
    counts = {m: bench_moe.call_count(tp8, m) for m in (1, 64, 4096, 8192, 16384, 1 << 17)}
    assert counts == {1: 11, 64: 8, 4096: 8, 8192: 4, 16384: 2, 1 << 17: 2}


def test_wrong_numbers_are_not_timed(measurement: bench_run.Measurement) -> None:
    rows: list[dict[str, Any]] = []
    measurement.provider(_Peer("marlin-w4a16", "wrong"), rows)
    assert [row["wrong"] for row in rows] == [True, True], "NaN must count as wrong"
    assert not any("us" in row for row in rows)


def test_a_lost_context_ends_the_run(
    measurement: bench_run.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(bench_run.ContextLost):
        measurement.provider(_Peer("marlin-w4a16", "run", fails_at=1), rows)
    assert rows[-1]["reason"].startswith("RuntimeError: M = 1")


def test_a_slow_peer_is_given_up(
    measurement: bench_run.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement._options, "peer_limit", 0.05)

    def endless(*_: object) -> list[float]:
        while True:
            pass

    monkeypatch.setattr(bench_run, "graph_times_us", endless)
    rows: list[dict[str, Any]] = []
    measurement.provider(_Peer("marlin-w4a16"), rows)
    assert "not done after" in rows[-1]["reason"]
