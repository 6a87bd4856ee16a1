"""``plan``: numbers worked out by hand, layouts, and what is refused."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.errors import ShardError
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.plan import Layout, Plan, as_document, as_text, make_plan
from sglang_w4afp8.tools.plan_gpus import GPUS
from sglang_w4afp8.tools.plan_ranks import ClassRow, default_mem_fraction, plan_kv, plan_rank
from sglang_w4afp8.tools.plan_source import built_in, find_model
from sglang_w4afp8.tools.plan_stock import REFUSES, WORKS, WRONG, stock_answer

GOLDEN = Path(__file__).parent / "golden" / "plan-deepseek-r1-tp32-l40s.json"


def plan(name: str, tp: int, gpu: str = "h100", ep: int = 1, **fields: Any) -> Plan:
    return make_plan(find_model(name), Layout(tp, ep, max(1, tp // 8), GPUS[gpu], **fields))


def row(found: Plan, name: str) -> ClassRow:
    return next(row for row in found.rank.rows if row.name == name)


def call(capsys: Any, *words: object) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("DeepSeek-R1", 671.0),
        ("Kimi-K2", 1026.4),
        ("Qwen3-235B-A22B", 235.1),
        ("Qwen3-Coder-480B-A35B-Instruct", 480.2),
        ("Qwen3-30B-A3B", 30.5),
        ("GLM-4.5-Air", 106.9),
        ("GLM-5", 743.9),
    ],
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert round(find_model(name).parameters / 1e9, 1) == billions


def test_deepseek_r1_at_tp_32() -> None:
    found = plan("DeepSeek-R1", 32, "l40s")
    up, down = row(found, "experts gate, up"), row(found, "experts down")
    assert (up.layers, up.copies, up.local_shape) == (58, 256, (128, 7168))
    assert (down.local_shape, down.scales) == ((7168, 64), "INT4 group 128→64")
    # Codes half a byte, scales two bytes: per 128 columns in gate and up, per 64 in down.
    assert up.nbytes == 58 * 256 * (128 * 3584 + 128 * 56 * 2)
    assert down.nbytes == 58 * 256 * (7168 * 32 + 7168 * 1 * 2)
    # 18432 / 32 = 576 = 4.5 blocks; 2048 / 32 = 64, half a block. One byte, scales four.
    dense, shared = row(found, "dense MLP gate_up_proj"), row(found, "shared expert down_proj")
    assert (dense.layers, dense.local_shape, dense.scales) == (3, (1152, 7168), "FP8 64×128")
    assert dense.nbytes == 3 * (1152 * 7168 + 18 * 56 * 4)
    assert (shared.layers, shared.local_shape, shared.scales) == (58, (7168, 64), "FP8 128×64")
    assert shared.nbytes == 58 * (7168 * 64 + 56 * 1 * 4)
    assert not dense.divides and not shared.divides and not down.divides
    # q_a and kv_a are whole on every rank: 1536 + 512 + 64 rows, 16.5 blocks.
    whole = row(found, "attention fused_qkv_a_proj")
    assert (whole.local_shape, whole.divides) == ((2112, 7168), True)
    assert whole.nbytes == 61 * (2112 * 7168 + 17 * 56 * 4)
    assert row(found, "embedding, lm_head").nbytes == 2 * 129280 // 32 * 7168 * 2
    assert found.rank.nbytes == sum(item.nbytes for item in found.rank.rows) == 12404335392
    assert (
        found.rank.mtp_bytes
        == sum(
            item.nbytes // item.layers
            for item in found.rank.rows
            if not item.name.startswith(("dense", "embedding"))
        )
        + 4 * 7168**2
    )


@pytest.mark.parametrize(
    ("name", "tp", "columns", "group", "lost"),
    [
        ("Qwen3-235B-A22B", 8, 192, 64, "1 of 2"),
        ("Qwen3-480B", 8, 320, 64, "2 of 3"),
        ("Kimi-K2", 32, 64, 64, "0 of 1"),
        ("GLM-4.5-Air", 8, 176, 16, "1 of 3"),
        ("GLM-5.2", 64, 32, 32, "0 of 1"),
    ],
)
def test_widths_that_are_no_whole_groups(
    name: str, tp: int, columns: int, group: int, lost: str
) -> None:
    found = plan(name, tp)
    down = row(found, "experts down")
    assert down.local_shape[1] == columns
    assert down.scales == f"INT4 group 128→{group}"
    assert any(f"loads {lost} scale columns" in reason for reason in found.stock.reasons)


def test_padding_is_counted_where_the_kernel_pads() -> None:
    """176 columns of 1408: CUTLASS holds up to three whole groups, 384 columns."""
    found = plan("GLM-4.5-Air", 8, "h100")
    assert found.rank.backend == "cutlass"
    up, down = row(found, "experts gate, up"), row(found, "experts down")
    assert up.nbytes == 45 * 128 * 2 * 384 * (2048 + 32 * 2)
    assert down.nbytes == 45 * 128 * 4096 * (192 + 3 * 2)
    assert "padded to 384" in up.cut
    unpadded = plan("GLM-4.5-Air", 8, "l40s")
    assert row(unpadded, "experts gate, up").nbytes == 45 * 128 * 2 * 176 * (2048 + 32 * 2)


def test_cache_sizes() -> None:
    r1, qwen, v32 = (find_model(n) for n in ("deepseek-r1", "qwen3-235b", "deepseek-v3.2"))
    h200 = GPUS["h200"]
    assert plan_kv(r1, 32, h200, 0).bytes_per_token == (512 + 64) * 61 * 2
    assert plan_kv(r1, 32, h200, 0).replicas == 32
    assert plan_kv(r1, 8, h200, 0, kv_bytes=1, draft_layers=1).bytes_per_token == 576 * 62
    assert plan_kv(qwen, 2, h200, 0).bytes_per_token == 2 * 256 * 94 * 2
    assert plan_kv(qwen, 8, h200, 0).bytes_per_token == 1 * 256 * 94 * 2
    assert (plan_kv(qwen, 2, h200, 0).replicas, plan_kv(qwen, 8, h200, 0).replicas) == (1, 2)
    assert plan_kv(v32, 8, h200, 0).bytes_per_token == 576 * 61 * 2 + (128 + 4) * 61
    kv = plan_kv(r1, 8, h200, 40 * 2**30, mem_fraction=0.8)
    assert math.isclose(kv.free_gib, (143771 / 1024 - 1) * 0.8 - 40)
    assert kv.tokens == int(kv.free_gib * 2**30 // 70272)


def test_memory_fraction() -> None:
    """46068 MiB: 512 + 1.5 · 4096 + 32/8 · 1024 + 2 · 160 + 1536 = 12608 MiB are set aside."""
    fraction = default_mem_fraction(find_model("deepseek-r1"), 32, GPUS["l40s"])
    assert fraction == round((46068 - 12608) / 46068, 3)


def test_golden_document() -> None:
    """Regenerate: sglang-w4afp8 plan DeepSeek-R1 --tp 32 --gpu l40s --context 8192 --json."""
    made = as_document(plan("DeepSeek-R1", 32, "l40s", context=8192))
    assert json.loads(json.dumps(made)) == json.loads(GOLDEN.read_text())


def test_one_screen() -> None:
    for name in ("DeepSeek-R1", "GLM-5.2", "Qwen3-235B-A22B"):
        lines = as_text(plan(name, 32, "l40s", mtp=True))
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 132
    text = "\n".join(as_text(plan("DeepSeek-R1", 32, "l40s", context=8192)))
    for wanted in ("128→64", "1152 × 7168", "12.4 GB", "not hopper", "fit from 16", "refuses"):
        assert wanted in text


# --------------------------------------------------------------------------------------- layouts


def test_degrees() -> None:
    assert find_model("deepseek-r1").degrees() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert find_model("kimi-k2").degrees()[-1] == 64
    # 96 heads, 8 key heads, 2560 columns: 3, 6, 12 … fail at the vocabulary or at the key heads.
    assert find_model("qwen3-480b").degrees() == [1, 2, 4, 8, 16, 32]
    # 10944 of the dense MLP: 10944 / 64 = 171; but 96 heads stop at 32.
    assert find_model("glm-4.5-air").degrees()[-1] == 32
    assert find_model("deepseek-r1").degrees(ep=8) == [8, 16, 32, 64, 128]


def test_expert_parallelism_keeps_experts_whole() -> None:
    found = plan("DeepSeek-R1", 32, "h20", ep=32)
    down = row(found, "experts down")
    assert (down.copies, down.local_shape, down.divides) == (8, (7168, 2048), True)
    assert row(found, "dense MLP down_proj").local_shape == (7168, 576)


@pytest.mark.parametrize(
    ("tp", "ep", "said", "ways"),
    [
        (24, 1, "128 over 24", ["--tp 32", "--tp 16"]),
        (256, 1, "128 over 256", ["--tp 128"]),
        (32, 3, "--tp 32 --ep 3", ["--tp"]),
    ],
)
def test_what_cannot_be_cut(tp: int, ep: int, said: str, ways: list[str]) -> None:
    with pytest.raises(ShardError) as caught:
        plan("deepseek-r1", tp, ep=ep)
    assert said in str(caught.value) and all(way in str(caught.value) for way in ways)


@pytest.mark.parametrize(
    ("name", "gpu", "verdict"),
    [("deepseek-r1", "h20", WORKS), ("deepseek-r1", "l40s", REFUSES), ("glm-4.5", "h20", REFUSES)],
)
def test_stock_at_tp_8(name: str, gpu: str, verdict: str) -> None:
    assert plan(name, 8, gpu).stock.verdict == verdict


def test_stock_is_silently_wrong_where_nothing_checks() -> None:
    """Qwen3 has no shared expert whose FP8 check would notice; config.json names no block."""
    model = replace(find_model("qwen3-235b"), states_block=False)
    assert stock_answer(model, 8, 1, GPUS["h20"]).verdict == WRONG
    assert stock_answer(model, 4, 1, GPUS["h20"]).verdict == WORKS
    dynamic = replace(model.spec, moe_activation=ActivationScheme.DYNAMIC_PER_TOKEN)
    assert stock_answer(replace(model, spec=dynamic), 4, 1, GPUS["h20"]).verdict == WRONG


# ------------------------------------------------------------------------------------------- CLI


def test_every_built_in_config_can_be_planned() -> None:
    names = [name for entry in built_in() for name in entry["names"]]
    assert len(names) == len({name.lower() for name in names}) >= 25
    for entry in built_in():
        model = find_model(f"someone/{entry['names'][-1]}-FP8")
        assert plan_rank(model, 8, 1, GPUS["h200"]).nbytes > 0
    assert resources.files("sglang_w4afp8.tools").joinpath("plan_models.json").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "*.json" in project["tool"]["setuptools"]["package-data"]["*"]


def test_exit_codes(capsys: Any) -> None:
    code, out, _ = call(capsys, "deepseek-r1", "--tp", 4, "--gpu", "l40s")
    assert code == 1
    assert "GiB too large" in out and "163840 tokens fit from 16" in out
    code, _, err = call(capsys, "deepseek-r1", "--tp", 24)
    assert code == 1 and "(1) --tp" in err
    assert call(capsys, "deepseek-r1", "--tp", 8, "--nnodes", 3)[0] == 2


def test_the_server_s_variables_count(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "dynamic_per_tensor")
    made = json.loads(call(capsys, "deepseek-r1", "--gpu", "h200", "--json")[1])
    assert made["model"]["moe_activation"] == "dynamic_per_tensor"
    assert made["backend"]["chosen"] == "cutlass"
    assert made["stock_sglang"]["verdict"] == WRONG
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "hopper")
    code, _, err = call(capsys, "deepseek-r1", "--gpu", "h200")
    assert code == 1 and "SGLANG_W4AFP8_MOE_BACKEND=hopper" in err


def test_a_forced_backend_counts_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4.5-Air: 352 columns at TP 4 suit it, 176 at TP 8 do not; a sequence fits at neither."""
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "hopper")
    small = replace(GPUS["h100"], memory_mib=20 * 1024)
    found = make_plan(find_model("GLM-4.5-Air"), Layout(4, 1, 1, small))
    assert (found.rank.backend, found.smallest_fit) == ("hopper", None)
