"""``shard_check`` passes a converted checkpoint, and fails one whose ranks would not add up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sglang_w4afp8.srt import shard_check

pytestmark = pytest.mark.sglang


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets a variable and a log level for its process."""
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    logger = logging.getLogger("sglang.srt.layers.quantization.w4afp8")
    level = logger.level
    yield
    logger.setLevel(level)


def test_all_layers_of_a_checkpoint(
    checkpoint_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint_of("deepseek-192-320")
    assert shard_check.main([str(folder), "--tp", "1", "8", "--ep", "1", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["tp"], row["ep"]) for row in rows} == {(1, 1), (8, 1), (8, 2)}
    kinds = {row["layer"].partition(".mlp")[2] for row in rows}
    assert kinds == {".experts", ".shared_experts", ""}
    assert all(row["passed"] for row in rows)
    cut = [row["stock"] for row in rows if row["tp"] == 8]
    assert any(stock != "works" for stock in cut)


def test_ranks_that_do_not_add_up_fail(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_of("deepseek-192-320")
    run = shard_check.run_mlp
    monkeypatch.setattr(shard_check, "run_mlp", lambda mlp, x: 1.0001 * run(mlp, x))
    assert shard_check.main([str(folder), "--tp", "8"]) == 1
