"""The paper model: its formulas by hand, and the committed result."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.tools.plan_gpus import GPUS
from sglang_w4afp8.tools.plan_ranks import plan_rank
from sglang_w4afp8.tools.plan_scaling import (
    FABRICS,
    PUBLISHED,
    all_reduce_us,
    estimate,
    estimate_ep,
    touched,
)
from sglang_w4afp8.tools.plan_source import find_model

ROOT = Path(__file__).resolve().parents[2]
R1 = find_model("deepseek-r1")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "scaling_on_paper.py"
    spec = importlib.util.spec_from_file_location("scaling_on_paper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_result_is_what_the_script_makes(script: ModuleType) -> None:
    made = json.loads(json.dumps(script.document()))
    assert json.loads(script.OUT.read_text()) == made, "python benchmarks/scaling_on_paper.py"


def test_the_published_run_agrees_with_itself() -> None:
    """128 sequences, 200 tokens each in TTFT + 200 · ITL: within 1 % of the tokens per second."""
    seconds = PUBLISHED["ttft_ms"] / 1e3 + 200 * PUBLISHED["itl_ms"] / 1e3
    assert math.isclose(128 * 200 / seconds, PUBLISHED["output_tokens_per_s"], rel_tol=0.01)


def test_all_reduce_by_hand() -> None:
    """32 ranks on 4 machines, PCIe: 25.6 GB/s after the share; small and large messages."""
    pcie, l40s = FABRICS["pcie"], GPUS["l40s"]
    # Nothing to send: the tree of LL, 2 · (7 steps at 1.0 + 2 at 5.0) + 6.8 µs.
    assert math.isclose(all_reduce_us(0, 32, pcie, l40s), 6.8 + 2 * (7 * 1.0 + 2 * 5.0))
    # 1.835 MB: the tree of LL128, 2 · (7 · 1.9 + 2 · 8.5) + 14 µs, twice the bytes at 15/16.
    size = 128 * 7168 * 2
    by_hand = 14 + 2 * (7 * 1.9 + 2 * 8.5) + 2 * size / 25.6e3 * 16 / 15
    assert math.isclose(all_reduce_us(size, 32, pcie, l40s), by_hand)
    # A gigabyte: the ring, 62 steps of which 8 between machines, 2 · 31 / 32 of the bytes.
    by_hand = 14 + 54 * 2.5 + 8 * 4.0 + 2 * 31 / 32 * 1e9 / 25.6e3 * 16 / 15
    assert math.isclose(all_reduce_us(1e9, 32, pcie, l40s), by_hand)
    assert all_reduce_us(1e6, 1, pcie, l40s) == 0
    # One NVLink domain on Hopper: the switch reduces, 25 µs and the bytes once at 360 GB/s.
    size = 10_000_000
    assert math.isclose(all_reduce_us(size, 64, FABRICS["nvlink"], GPUS["h100"]), 25 + size / 360e3)


def test_experts_that_are_read() -> None:
    assert touched(256, 8, 1) == 8 / 256
    assert math.isclose(touched(256, 8, 128), 0.98282, abs_tol=1e-5)
    assert math.isclose(touched(4, 2, 3), 1 - 1 / 8)


def test_an_estimate_by_hand() -> None:
    l40s, pcie = GPUS["l40s"], FABRICS["pcie"]
    found = estimate(R1, 32, 1, l40s, pcie)
    rows = {row.name: row.nbytes for row in plan_rank(R1, 32, 1, l40s).rows}
    experts = rows["experts gate, up"] + rows["experts down"]
    rest = sum(n for name, n in rows.items() if not name.startswith("experts"))
    # One of embedding and lm_head; kv_b_proj in its absorbed form only.
    rest -= rows["embedding, lm_head"] // 2 + rows["attention kv_b_proj"]
    assert found.weight_bytes == round(experts * 8 / 256 + rest)
    assert found.kv_bytes == 300 * 70272
    assert found.exchanged_bytes == 123 * 7168 * 2
    read = (found.weight_bytes + found.kv_bytes) / (0.8 * 864e9)
    assert math.isclose(found.read_ms, 1e3 * read)
    network = 123 * all_reduce_us(7168 * 2, 32, pcie, l40s) / 1e3 + 129280 * 2 / 25.6e6
    assert math.isclose(found.exchange_ms, network)
    assert math.isclose(found.itl_ms, found.read_ms + found.exchange_ms)


def test_large_batches_are_bound_by_the_multiplications() -> None:
    """H20: 37.5 billion active weights, 2 operations, 296 TFLOPS at half."""
    found = estimate(R1, 8, 4096, GPUS["h20"], FABRICS["nvlink"], context=1)
    active = R1.parameters - R1.expert_parameters * 248 / 256
    assert math.isclose(found.read_ms, 2 * active * 4096 / 8 / 0.5 / 296e12 * 1e3)


def test_expert_parallelism_by_hand() -> None:
    h20, rdma = GPUS["h20"], FABRICS["rdma"]
    found = estimate_ep(R1, 32, 128, h20, rdma)
    sent = 4 * 8 * 7168 * 3  # tokens, experts each, FP8 out and BF16 back
    us = 58 * (2 * (6.6 + 2.7) + sent / (0.8 * 50e3))
    assert math.isclose(found.exchange_ms, us / 1e3)
    assert found.kv_bytes == 4 * 300 * 70272
    whole = estimate(R1, 1, 128, h20, rdma).weight_bytes
    experts = R1.expert_parameters * (0.5 + 2 / 128) * touched(256, 8, 128)
    assert math.isclose(found.weight_bytes, whole - experts * 31 / 32, rel_tol=1e-6)


def test_the_command_says_that_it_estimates(capsys: Any) -> None:
    assert cli.main(["plan", "deepseek-r1", "--scaling", "--gpu", "l40s"]) == 0
    out = capsys.readouterr().out
    assert "300 tokens of context" in out
    assert "ESTIMATE" in out and "473 output tok/s" in out and "does not fit" in out
    assert cli.main(["plan", "deepseek-r1", "--scaling", "--gpu", "l40s", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["estimate"] is True and made["context_tokens"] == 300
    assert {row["fabric"] for row in made["rows"]} == {"pcie"}
