"""``bench tune`` without a GPU: limits from made-up times, and the table that a run leaves."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_w4afp8 import cli
from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.hopper import plan, tables
from sglang_w4afp8.kernels.hopper.plan import PATHS, UNLIMITED, Layer, Limits
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools import bench_moe, bench_tune
from sglang_w4afp8.tools.bench_choose import (
    CLOSE,
    Times,
    between,
    choose,
    first_numbers,
    path_of,
    search,
)

TP8 = Layer(256, 7168, 256, 128, 128, 8, False, False)
CARD = "NVIDIA H100 80GB HBM3"
CROSSINGS = (12.0, 100.0, 900.0)
"""Where the lines of :func:`made_up` meet, from small and medium to large and prefill."""


def made_up(path: str, tokens: int) -> float | None:
    """Four straight lines; small stops at 16 tokens, medium at 256."""
    most = {"small": 16, "medium": 256}.get(path, UNLIMITED)
    slopes = dict(zip(PATHS, (5.0, 2.0, 1.0, 0.25), strict=True))
    start, us = 10.0, {}
    for number, name in enumerate(PATHS):
        us[name] = start + slopes[name] * tokens
        if number < len(CROSSINGS):
            start += (slopes[name] - slopes[PATHS[number + 1]]) * CROSSINGS[number]
    return us[path] if tokens <= most else None


def measured(*numbers: int, **changed: dict[int, float]) -> Times:
    """Made-up times at some numbers, with changes."""
    times: Times = {
        path: {m: us for m in numbers if (us := made_up(path, m)) is not None} for path in PATHS
    }
    for path, at in changed.items():
        times[path] |= at
    return times


def test_limits_are_where_the_lines_meet() -> None:
    assert choose(measured(1, 8, 16, 64, 128, 256, 512, 1024)) == Limits(8, 64, 512)


def test_search_closes_in() -> None:
    asked: list[tuple[str, int]] = []

    def measure(path: str, tokens: int) -> float | None:
        asked.append((path, tokens))
        return made_up(path, tokens)

    told: list[tuple[int, int]] = []
    times, limits = search(measure, 5000, lambda done, total: told.append((done, total)))
    for most, crossing in zip(limits, CROSSINGS, strict=True):
        assert crossing / CLOSE / 1.05 <= most <= crossing, (most, crossing)
    assert len(asked) == len(set(asked)) < 140, "minutes at most, nothing twice"
    assert 5000 in times["prefill"] and 5000 not in times["medium"]
    assert all(done <= total for done, total in told) and told[-1][0] == told[-1][1] == len(asked)


def test_a_path_that_is_never_fastest_is_not_used() -> None:
    numbers = (1, 8, 16, 64, 128, 256, 512, 1024)
    slow = measured(*numbers, medium=dict.fromkeys(numbers[:6], 1e6))
    limits = choose(slow)
    assert limits.medium == 0 and path_of(limits, 64) == "large"
    # Without prefill's gain the last path that is used has no limit.
    never = measured(*numbers, prefill=dict.fromkeys(numbers, 1e6))
    assert choose(never).large == UNLIMITED
    assert not plan.takes_prefill(replace(TP8, limits=choose(never)), 1 << 20)


def test_noise_does_not_choose() -> None:
    """One point at which a path looks 0.5 % faster is no reason for it; 5 % at two points is."""
    flat = {m: 100.0 for m in (1, 2, 4, 8)}
    times: Times = {"small": {}, "medium": flat | {2: 99.5}, "large": flat, "prefill": {}}
    assert choose(times) == Limits(0, UNLIMITED, 0)
    times["medium"] = {m: 200.0 for m in flat} | {1: 99.5}
    assert choose(times) == Limits(0, 0, UNLIMITED)
    times["medium"] |= {1: 95.0, 2: 95.0}
    assert choose(times) == Limits(0, 2, UNLIMITED)
    # One slow reading far beyond a limit does not move it.
    bumped = measured(1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, prefill={4096: 4500.0})
    assert bumped["large"][4096] < 4500
    assert choose(bumped).large == 512


def test_limits_mean_to_plan_what_they_mean_to_choose() -> None:
    for limits in (
        Limits(8, 64, 512),
        Limits(0, 16, 16),
        Limits(16, 0, UNLIMITED),
        Limits(4, 0, 4),
    ):
        layer = replace(TP8, limits=limits)
        for tokens in (1, 4, 5, 8, 9, 16, 17, 64, 65, 512, 513, 5000):
            wanted = path_of(limits, tokens)
            prefill = plan.takes_prefill(layer, tokens)
            assert wanted == ("prefill" if prefill else plan.plan(layer, tokens, 132).path), tokens


def test_what_cannot_be_covered_is_an_error() -> None:
    with pytest.raises(ValueError, match="no path covers"):
        # Paths follow each other; this would need large, then medium.
        choose({"small": {}, "medium": {8: 1.0}, "large": {4: 1.0}, "prefill": {}})


def test_numbers() -> None:
    assert first_numbers(5000)[-3:] == [2048, 4096, 5000] and first_numbers(8192)[-1] == 8192
    assert first_numbers(1) == [1]
    times = measured(1, 8, 16, 64, 65, 256)
    assert between(times, Limits(8, 64, UNLIMITED)) == [11], "64 and 65 have nothing between"
    assert between(measured(1, 2), Limits(1, 64, UNLIMITED)) == []


class FakeBench:
    """Made-up times instead of a card's."""

    device_name = CARD

    def __init__(self, shape: bench_moe.Shape, scheme: Any, codes: int, replays: int) -> None:
        self.layer = replace(
            TP8,
            experts=shape.experts,
            inner=shape.inner,
            dynamic=scheme is not ActivationScheme.STATIC,
            minus_eight=codes == 16,
        )

    def __call__(self, path: str, tokens: int) -> float | None:
        return made_up(path, tokens)


@pytest.fixture
def _card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_tune, "Bench", FakeBench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: CARD)
    monkeypatch.setattr(bench_tune, "environment", lambda commit: {"device": CARD, "commit": "c"})
    tables._usable.cache_clear()


@pytest.mark.usefixtures("_card")
def test_a_run_leaves_a_table_that_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tables.find(TP8, CARD).source == "built-in defaults"
    words = ["bench", "tune", "--model", "DeepSeek-R1", "--tp", "8", "--most-tokens", "4096"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    path = tables.user_path(CARD)
    found = tables.find(TP8, CARD)
    assert found.source == str(path) and str(path) in out
    assert path_of(found.limits, 4096) == "prefill" and tables.words(found.limits) in out
    assert "*" in out and "prefill" in out
    # Another shape is added, in another variant, in JSON.
    words = ["bench", "tune", "--shape", "r1-tp16", "--codes", "16", "--json"]
    monkeypatch.setattr(sys, "argv", ["/bin/sglang-w4afp8", *words])
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)[0]
    assert (told["device"], told["commit"]) == (CARD, "c")
    assert told["command"] == "sglang-w4afp8 bench tune --shape r1-tp16 --codes 16 --json"
    assert told["limits"] == found.limits._asdict() and told["us"]["small"]["1"] > 0
    assert tables.find(TP8, CARD) == found
    tp16 = replace(TP8, inner=128, minus_eight=True)
    assert tables.find(tp16, CARD).source == str(path)


@pytest.mark.usefixtures("_card")
def test_a_table_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "here.json"
    table.write_text("no table")
    assert cli.main(["bench", "tune", "--shape", "r1-tp8", "--table", str(table)]) == 0
    assert tables.read(table, CARD).layers and not tables.user_path(CARD).exists()
    assert "here.json.unusable" in capsys.readouterr().out


def test_dry_run_needs_no_card_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_CACHE_DIR", str(tmp_path / "cache"))
    words = ["bench", "tune", "--model", "DeepSeek-R1", "--tp", "16", "--ep", "2", "--dry-run"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "128 of 256 experts, 7168 x 256, top 8" in out and "4096, 8192 tokens" in out
    assert "would write" in out and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model", "DeepSeek-R1", "--tp", "12", "--dry-run"], 1, "128 over 12"),
        (["--shape", "r1-tp8", "--most-tokens", "0"], 2, "--most-tokens 0"),
        (["--shape", "r1-tp8"], 1, "no CUDA device"),
    ],
)
def test_errors(words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tune", *words]) == code
    assert says in capsys.readouterr().err


def test_a_shape_that_is_none_is_told_why(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--shape", "r1-tp9"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["bench", "tune", *words])
        assert caught.value.code == 2
    assert "is none of r1-tp4" in capsys.readouterr().err


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> bench_tune.Bench:
    """A bench whose kernels are ``x · 2`` and whose clock says 7 us."""
    bench = object.__new__(bench_tune.Bench)
    bench.layer, bench._sms, bench._replays = TP8, 132, 3
    bench._shape = replace(bench_moe.shape_of("r1-tp8"), hidden=64, all_experts=16, experts=16)
    bench._scheme, bench._inputs, bench._loaded = ActivationScheme.STATIC, (0, []), [None]  # type: ignore[list-item]
    calls = bench_tune.random_calls
    monkeypatch.setattr(bench_tune, "random_calls", lambda *a, **k: calls(*a, **k, device="cpu"))
    monkeypatch.setattr(bench_tune, "oracle", lambda _, call, scheme: call.x.double() * 2)
    monkeypatch.setattr(bench_tune, "graph_times_us", lambda body, *_: [7.0 for _ in body()][:1])
    monkeypatch.setattr(bench_tune.Bench, "_run", lambda _, path, number, call: call.x * 2)
    return bench


def test_paths_that_cannot_run_a_call_are_not_timed(on_cpu: bench_tune.Bench) -> None:
    assert [on_cpu(path, 8) for path in PATHS] == [7.0] * 4
    assert [on_cpu(path, 300) for path in PATHS] == [None, None, 7.0, 7.0]


@pytest.mark.parametrize("value", [math.nan, 99.0])
def test_a_wrong_path_is_an_error_not_a_time(
    on_cpu: bench_tune.Bench, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Any, path: str, number: int, call: bench_moe.Call) -> torch.Tensor:
        out = call.x * 2
        if path == "prefill":
            out[0, 0] = value
        return out

    monkeypatch.setattr(bench_tune.Bench, "_run", run)
    assert on_cpu("large", 100) == 7.0
    with pytest.raises(BackendError, match="path prefill, 100 tokens"):
        on_cpu("prefill", 100)
