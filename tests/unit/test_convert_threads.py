"""What conversion on a GPU adds, run without one: threads, read-ahead, the search kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_w4afp8.checkpoint.index import open_index
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.checkpoint.stream import tensor_bytes
from sglang_w4afp8.testing.checkpoints import MoeShape, write_fp8
from sglang_w4afp8.tools import convert, rewrite, rewrite_job

_KERNEL = """
import torch
from sglang_w4afp8.quantize import mse
from sglang_w4afp8.quantize.rtn import round_scale
from sglang_w4afp8.quantize.search_cuda import search_scales_cuda

torch.manual_seed(0)
for group in (32, 128):
    for symmetric in (False, True):
        groups = torch.randn(9, 5, group) ** 3
        groups[4, 2] = 0.0
        expected = mse.search_scales(groups, symmetric=symmetric)
        found = search_scales_cuda(groups, *mse.plan_search(groups, symmetric=symmetric))
        same = (round_scale(found) == round_scale(expected)).double().mean()
        assert same == 1.0, (group, symmetric, float(same))
print("same scales")
"""


def test_the_search_kernel_under_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "same scales", done.stderr[-2000:]


def test_threads_of_a_gpu_make_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road of ``--device cuda``, with the arithmetic on the CPU and ordinary memory."""
    source = write_fp8(tmp_path / "src", MoeShape(experts=6), shards=5)
    convert.convert_checkpoint(source, tmp_path / "plain")
    monkeypatch.setattr(convert, "check_device", lambda device: "cpu")  # what decides the bytes
    seen: list[str] = []

    def on_stream(
        job: rewrite_job.ShardJob, place: rewrite_job.JobPlace, advance: Callable[[int], None]
    ) -> rewrite_job.ShardRecord:
        seen.append(place.device)
        return rewrite_job.run_job(job, replace(place, device="cpu"), advance)

    monkeypatch.setattr(rewrite, "run_job_on_stream", on_stream)
    report = convert.convert_checkpoint(source, tmp_path / "threads", device="cuda", workers=3)
    assert seen == ["cuda"] * report.shards
    assert {"read", "compute", "hash", "write", "wait for sync"} <= report.stage_seconds.keys()
    assert all(seconds >= 0.0 for seconds in report.stage_seconds.values())
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "threads" / file.name).read_bytes(), file.name


def test_reading_ahead_in_several_threads(tmp_path: Path) -> None:
    source = write_fp8(tmp_path / "src", MoeShape(experts=6), shards=2)
    index = open_index(source)
    entries = list(index)
    with TensorReader(source, threads=3) as reader, TensorReader(source) as plain:
        reader.prefetch(entries)
        for entry in reversed(entries):
            ahead, direct = reader.read(entry), plain.read(entry)
            assert ahead.dtype == direct.dtype
            assert ahead.shape == direct.shape
            assert bytes(tensor_bytes(ahead)) == bytes(tensor_bytes(direct))
        assert reader.stages.seconds["read"] > 0.0
