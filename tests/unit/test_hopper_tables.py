"""Tuning tables: what is looked up where, what a broken one does, and that plan() obeys."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.kernels.hopper import plan, tables
from sglang_w4afp8.kernels.hopper.plan import Layer, Limits, default_limits
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill

TP8 = Layer(256, 7168, 256, 128, 128, 8, False, False)
OTHER = Layer(64, 2048, 192, 128, 64, 6, True, True)
CARD = "NVIDIA H100 80GB HBM3"


def limits(**named: int) -> Limits:
    """Defaults of TP8 but for the named ones: paths may have been added since."""
    return default_limits(TP8)._replace(**named)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    tables._usable.cache_clear()
    tables.log_once.cache_clear()


def test_plan_obeys_limits() -> None:
    layer = replace(TP8, limits=limits(small=3, medium=40))
    paths = {m: plan.plan(layer, m, 132).path for m in (1, 3, 4, 8, 40, 41, 200)}
    assert paths == {
        1: "small", 3: "small", 4: "medium", 8: "medium", 40: "medium", 41: "large", 200: "large",
    }  # fmt: skip
    assert plan.plan(TP8, 8, 132).path == "small" and plan.plan(TP8, 200, 132).path == "medium"
    never = replace(TP8, limits=limits(small=0, medium=0))
    assert plan.plan(never, 1, 132).path == "large"
    # A limit beyond what a path can run: the next path, not an error.
    beyond = replace(TP8, limits=limits(small=1 << 20, medium=1 << 20))
    assert [plan.plan(beyond, m, 132).path for m in (16, 17, 256)] == ["small", "medium", "medium"]
    assert plan.plan(beyond, 257, 132).path == "large"


def test_prefill_begins_beyond_the_last_limit() -> None:
    assert [plan.takes_prefill(TP8, m) for m in (1023, 1024)] == [False, True], "without a table"
    layer = replace(TP8, limits=limits(large=700))
    assert [plan.takes_prefill(layer, m) for m in (1, 700, 701, 1 << 20)] == [False] * 2 + [
        True
    ] * 2
    early = replace(TP8, limits=limits(medium=256, large=0))
    assert [plan.takes_prefill(early, m) for m in (256, 257)] == [False, True]


def test_a_forced_path_ignores_limits() -> None:
    layer = replace(TP8, limits=limits(small=0, medium=0, large=0))
    for path in ("small", "medium", "large"):
        assert plan.plan(layer, 4, 132, path).path == path
        assert not plan.takes_prefill(layer, 1 << 20, path)
    assert plan.takes_prefill(TP8, 4, "prefill")


def test_kernels_of_all_limits_are_built_ahead() -> None:
    layer = replace(TP8, limits=limits(small=12, medium=100))
    ahead = set(plan.kernels(TP8, 132))
    for tokens in range(1, 300):
        assert {launch.kernel for launch in plan.plan(layer, tokens, 132).launches} <= ahead
    prefill = {launch.kernel for launch in plan_prefill(TP8, 4096, 132).launches}
    assert prefill <= ahead
    never = replace(TP8, limits=limits(large=plan.UNLIMITED))
    assert not prefill & set(plan.kernels(never, 132)), "kernels that no call takes"


def test_the_users_table_wins_then_the_committed_then_defaults() -> None:
    assert tables.find(TP8, CARD) == tables.Found(default_limits(TP8), "built-in defaults")
    committed, own = tables.committed_path(CARD), tables.user_path(CARD)
    assert committed.name == own.name == "nvidia-h100-80gb-hbm3.json"
    tables.save(committed, TP8, limits(small=5), CARD, "a")
    tables.save(committed, OTHER, limits(small=7), CARD, "a")
    assert tables.find(TP8, CARD) == tables.Found(limits(small=5), str(committed))
    tables.save(own, TP8, limits(small=6), CARD, "b")
    assert tables.find(TP8, CARD) == tables.Found(limits(small=6), str(own))
    assert tables.find(OTHER, CARD).limits.small == 7, "the user's table does not know this layer"
    assert tables.find(TP8, "NVIDIA H200").source == "built-in defaults"
    assert tables.find(replace(TP8, experts=32), CARD).source == "built-in defaults"


def test_another_variant_of_the_same_sizes_is_used_and_told() -> None:
    path = tables.user_path(CARD)
    tables.save(path, TP8, limits(small=5), CARD, "a")
    dynamic = replace(TP8, dynamic=True)
    found = tables.find(dynamic, CARD)
    assert found.limits.small == 5 and found.source.endswith("measured with static, 15 codes")
    tables.save(path, dynamic, limits(small=4), CARD, "a")
    assert tables.find(dynamic, CARD) == tables.Found(limits(small=4), str(path))
    assert tables.find(TP8, CARD).limits.small == 5


def test_a_path_that_the_table_does_not_name_keeps_its_default() -> None:
    assert tables.limits_of({"small": 2}, TP8) == default_limits(TP8)._replace(small=2)


def good() -> dict[str, Any]:
    entry = {"limits": {"small": 8, "medium": 64}, "from": "here"}
    return {
        "format": 1,
        "device": CARD,
        "layers": {tables.sizes(TP8): {tables.variant(TP8): entry}},
    }


def broken() -> dict[str, str]:
    """What can be wrong with a file, by what the error says."""
    unknown, negative, real, listed, empty, other = (good() for _ in range(6))
    entry = tables.sizes(TP8), tables.variant(TP8)
    unknown["layers"][entry[0]][entry[1]]["limits"] = {"tiny": 3}
    negative["layers"][entry[0]][entry[1]]["limits"] = {"small": -1}
    real["layers"][entry[0]][entry[1]]["limits"] = {"small": 2.5}
    listed["layers"][entry[0]][entry[1]] = [8, 64]
    empty["layers"][entry[0]] = {}
    other["device"] = "NVIDIA H20"
    return {
        "cannot be read": '{"format": 1, "lay',
        'has no "layers"': "[]",
        "its format is 2": json.dumps(good() | {"format": 2}),
        "it is for 'NVIDIA H20'": json.dumps(other),
        "limits a path 'tiny'": json.dumps(unknown),
        "small is -1": json.dumps(negative),
        "small is 2.5": json.dumps(real),
        'has no "limits"': json.dumps(listed),
        "has no variants": json.dumps(empty),
    }


@pytest.mark.parametrize("says", broken())
def test_a_table_that_cannot_be_used_is_told_and_left_out(
    says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tables.user_path(CARD)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(good()))
    assert tables.read(path, CARD).layers == good()["layers"]
    path.write_text(broken()[says])
    with pytest.raises(ConfigError, match=says) as caught:
        tables.read(path, CARD)
    assert any("bench tune" in way for way in caught.value.ways)
    assert f"rm {path}" in caught.value.ways
    with caplog.at_level(logging.WARNING):
        for layer in (TP8, OTHER, TP8):
            assert tables.find(layer, CARD).source == "built-in defaults"
    assert caplog.text.count(says) == 1, "once a process, not once a layer"
    tables.save(tables.committed_path(CARD), TP8, limits(small=5), CARD, "a")
    assert tables.find(TP8, CARD).limits.small == 5, "a broken own table hides no committed one"
    # Tuning again cures it and keeps the file for whoever wants to look.
    moved = tables.save(path, TP8, limits(small=6), CARD, "a")
    assert moved is not None and moved.read_text() == broken()[says]
    assert tables.find(TP8, CARD).limits.small == 6


def test_what_may_not_be_read_does_not_stop_a_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables.save(tables.user_path(CARD), TP8, limits(small=5), CARD, "a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        assert tables.find(TP8, CARD).source == "built-in defaults"
    assert "Permission denied" in caplog.text
    tables._usable.cache_clear()
    monkeypatch.setattr(os, "stat", refuse)  # of the folder, which Path.exists would pass on
    assert tables.find(TP8, CARD).source == "built-in defaults"


def test_a_table_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tables.user_path(CARD)
    tables.save(path, TP8, limits(small=5), CARD, "a")
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            tables.save(path, TP8, limits(small=6), CARD, "b")
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path], "a temporary file is left"


def test_the_log_says_which_table_once(caplog: pytest.LogCaptureFixture) -> None:
    path = tables.user_path(CARD)
    tables.save(path, TP8, limits(small=5, medium=77), CARD, "a")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            tables.log_once(TP8, CARD)
    told = "small to 5 tokens, medium to 77 tokens, large to 1023 tokens, prefill beyond"
    assert caplog.text.count(told) == 1 and str(path) in caplog.text
    assert tables.words(Limits(0, 64, 900)) == (
        "medium to 64 tokens, large to 900 tokens, prefill beyond"
    )
    assert tables.words(Limits(8, 0, 8)) == "small to 8 tokens, prefill beyond"


def test_committed_tables_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tables.__file__).parent / "tuning"
    monkeypatch.setattr(tables, "COMMITTED", folder)
    found = sorted(folder.glob("*.json"))
    assert found
    for path in found:
        device = json.loads(path.read_text())["device"]
        assert path == tables.committed_path(device)
        tables.read(path, device)
    assert str(folder) in tables.find(TP8, CARD).source


def test_kernels_of_committed_limits_are_built_ahead() -> None:
    """A graph is captured with what was loaded: whatever path a table gives a number of tokens."""
    seen = set()
    for path in sorted((Path(tables.__file__).parent / "tuning").glob("*.json")):
        for text, variants in json.loads(path.read_text())["layers"].items():
            sizes = [int(number) for number in re.findall(r"\d+", text)]
            for entry, dynamic in product(variants.values(), (False, True)):
                layer = Layer(*sizes, False, dynamic)
                assert tables.sizes(layer) == text
                layer = replace(layer, limits=tables.limits_of(entry["limits"], layer))
                ahead = set(plan.kernels(layer, 132))
                for tokens in (*range(1, 1300, 3), *range(1300, 20_000, 501)):
                    many = plan.takes_prefill(layer, tokens)
                    launches = (plan_prefill if many else plan.plan)(layer, tokens, 132).launches
                    assert {launch.kernel for launch in launches} <= ahead, tokens
                    seen.add(many)
    assert seen == {False, True}
