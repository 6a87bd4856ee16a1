"""SGLang's one-batch benchmark, which loads no plugins by itself, through our runner.

Two ranks are spawned as on GPUs; each must build its experts with our method.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sglang_w4afp8.testing.cpu_platform import NAME as CPU_PLATFORM

pytestmark = [pytest.mark.sglang, pytest.mark.server]


def test_one_batch_benchmark_uses_our_method_on_every_rank(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sglang_w4afp8.run", "sglang.benchmark.one_batch"]
    command += ["--model-path", str(checkpoint_of("qwen")), "--tp-size", "2"]
    command += ["--batch-size", "1", "--input-len", "8", "--output-len", "4"]
    command += ["--result-filename", str(tmp_path / "result.jsonl")]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command,
        env=kept | {"SGLANG_PLATFORM": CPU_PLATFORM, "SGLANG_W4AFP8_STRICT": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert log.count("registered quantization 'w4afp8'") == 1
    # The ranks' own lines: the first has our summary, both name the quantization they loaded.
    assert re.search(r"TP0\] sglang-w4afp8: \d+ MoE layers, tp=2, .*backend=torch", log), log[
        -4000:
    ]
    assert re.search(r"Decode\.\s+median latency", log), log[-4000:]
    assert (tmp_path / "result.jsonl").read_text().strip()
