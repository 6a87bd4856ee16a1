"""What is refused before a model is built: layouts that do not divide, files that are cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from safetensors.torch import save_file

from sglang_w4afp8.errors import CheckpointError, ConfigError, ShardError, W4AFp8Error
from sglang_w4afp8.spec import QuantSpec

pytestmark = pytest.mark.sglang


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_file({"a": torch.zeros(64, 64)}, tmp_path / "model-00001-of-00001.safetensors")
    return tmp_path


@contextmanager
def server(model: Path, **args: Any) -> Iterator[None]:
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(model_path=str(model), **args):
        yield


def check(model: Path, **args: Any) -> None:
    from sglang_w4afp8.srt.preflight import check_model

    with server(model, **args):
        check_model(QuantSpec())


@pytest.mark.parametrize("tp", [1, 8, 16, 32, 64])
def test_what_divides_passes(model: Path, tp: int) -> None:
    check(model, tp_size=tp)


@pytest.mark.parametrize(
    ("args", "numbers"),
    [
        ({"tp_size": 24}, ["2048", "24", "85.33", "--tp 32"]),
        ({"tp_size": 12}, ["2048", "12", "170.67", "--tp 16"]),
        ({"tp_size": 48, "ep_size": 48}, []),
        ({"tp_size": 8, "ep_size": 3}, ["--tp 8", "--ep-size 3", "--ep-size 4"]),
        ({"tp_size": 4096}, ["4096"]),
    ],
)
def test_what_does_not_divide(model: Path, args: dict[str, int], numbers: list[str]) -> None:
    if not numbers:
        check(model, **args)
        return
    with pytest.raises(ShardError) as caught:
        check(model, **args)
    assert all(number in str(caught.value) for number in numbers)
    assert len(str(caught.value).splitlines()) < 15


def test_dense_mlp_that_does_not_divide(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"hidden_size": 256, "intermediate_size": 1000}))
    with pytest.raises(ShardError, match=r"1000 over 16"):
        check(model, tp_size=16)


def test_truncated_file(model: Path) -> None:
    file = model / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        check(model)
    assert file.name in str(caught.value)
    assert "download" in str(caught.value)
    # Formats that never read the files do not ask for them.
    check(model, load_format="dummy")


def test_damaged_config(model: Path) -> None:
    (model / "config.json").write_text('{"hidden_size": 7168,')
    with pytest.raises(ConfigError, match=r"config\.json"):
        check(model)


def test_outside_a_server_nothing_is_checked() -> None:
    from sglang_w4afp8.srt.preflight import check_model

    check_model(QuantSpec())


def test_the_check_runs_once_before_the_first_layer(model: Path) -> None:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    with server(model, tp_size=24):
        config = ShardedW4AFp8Config(QuantSpec())
        with pytest.raises(W4AFp8Error):
            config.get_quant_method(torch.nn.Linear(1, 1), "model.layers.0.mlp.gate_up_proj")
