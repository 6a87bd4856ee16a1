"""Result files of ``bench moe``: names, what they say of their origin, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.tools import bench, bench_environment, bench_plot


def test_file_names() -> None:
    card = "NVIDIA H100 80GB HBM3"
    assert bench._stem(card, "r1-tp8", [1, 256]) == "moe-h100-r1-tp8"
    assert bench._stem(card, "r1-ep8", [256, 16384]) == "moe-h100-r1-ep8-prefill"


def test_a_result_explains_itself_without_git_and_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    root = Path(bench_environment.__file__).resolve().parents[2]
    git = tmp_path / "git"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.environment(None)["commit"] == bench.environment(None)["driver"] == "unknown"
    for top, commit in ((root, "abc123"), (tmp_path, "unknown")):
        git.write_text(f"#!/bin/sh\necho {top}\necho abc123\n")
        git.chmod(0o755)
        assert bench.environment(None)["commit"] == commit, "another project's checkout"
    assert bench.environment("def456")["commit"] == "def456"


def test_gpu_words() -> None:
    assert bench.gpu_word("NVIDIA H100 80GB HBM3") == "h100"
    assert bench.gpu_word("NVIDIA H200") == "h200"
    assert bench.gpu_word("NVIDIA L40S") == "l40s"


def test_picture_and_summary(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    common: dict[str, Any] = {"shape": "s", "routing": "uniform", "roofline_us": 2.0}
    rows = [
        common | {"provider": name, "m": m, "us": us * m}
        for name, us in (("ours", 10.0), ("sglang-cutlass", 40.0))
        for m in (1, 16)
    ]
    rows.append({"shape": "s", "provider": "marlin-w4a16", "reason": "no"})
    result = {"device": "H100", "rows": rows}
    lines = bench_plot.series(rows, "uniform")
    assert lines == {
        "ours": [(1, 10.0), (16, 160.0)],
        "sglang-cutlass": [(1, 40.0), (16, 640.0)],
        "roofline": [(1, 2.0), (16, 2.0)],
    }
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert bench.main(["plot", str(tmp_path / "r.json"), str(tmp_path / "r.png")]) == 0
    picture = image.open(tmp_path / "r.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {bench_plot.COLOURS[name] for name in lines} <= colours
    assert bench_plot.COLOURS["marlin-w4a16"] not in colours
    assert "sglang-cutlass" in bench_plot.summary(rows)


def test_one_picture_of_several_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    common: dict[str, Any] = {"routing": "uniform", "roofline_us": 2.0, "provider": "ours"}

    def result(shape: str, device: str, times: dict[int, float]) -> str:
        rows = [common | {"shape": shape, "m": m, "us": us} for m, us in times.items()]
        path = tmp_path / f"{shape}-{device}-{len(times)}.json"
        path.write_text(json.dumps({"device": device, "rows": rows}))
        return str(path)

    decode = result("r1-tp8", "H100", {1: 16.0, 256: 290.0})
    prefill = result("r1-tp8", "H100", {256: 280.0, 4096: 700.0, 16384: 2000.0})
    both = [json.loads(Path(name).read_text()) for name in (decode, prefill)]
    lines = bench_plot.series(bench_plot.merged(both)["rows"], "uniform")
    assert lines["ours"] == [(1, 16.0), (256, 280.0), (4096, 700.0), (16384, 2000.0)]
    png = tmp_path / "both.png"
    assert bench.main(["plot", decode, prefill, str(png)]) == 0
    assert image.open(png).size == (900, 560)
    for other in (result("r1-tp16", "H100", {1: 2.0}), result("r1-tp8", "H200", {1: 2.0})):
        with pytest.raises(ConfigError, match="results of several"):
            bench.main(["plot", decode, other, str(png)])
