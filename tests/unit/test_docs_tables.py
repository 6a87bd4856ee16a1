"""The generated tables in ``docs/`` say what the code says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sglang_w4afp8 import compat, env

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts/docs_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(script: ModuleType) -> None:
    assert {"variables", "hooks"} <= set(script.TABLES)
    for name, (file, make) in script.TABLES.items():
        text = (ROOT / "docs" / file).read_text()
        current = script.with_table(text, name, make()) == text
        assert current, f"{file}: {name}: run python scripts/docs_tables.py"


def test_an_outdated_table_is_noticed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    new = env.Variable("SGLANG_W4AFP8_NEW", "0", ("0", "1"), "Is new.")
    monkeypatch.setattr(env, "VARIABLES", (*env.VARIABLES, new))
    text = (ROOT / "docs/configuration.md").read_text()
    assert script.with_table(text, "variables", script.variables_table()) != text


def test_missing_markers_are_an_error(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 places"):
        script.with_table("no markers here", "variables", "|")


def test_the_page_names_the_range_and_the_tested_versions() -> None:
    text = (ROOT / "docs/compatibility.md").read_text()
    assert f"`sglang{compat.SUPPORTED_SGLANG}`" in text
    assert f"{' and '.join(compat.TESTED)}: contract" in text


def test_prefill_results_have_their_own_tables(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def row(provider: str, m: int, us: float, routing: str = "uniform") -> dict[str, object]:
        ratio = {} if provider == "ours" else {"times_ours": 2.0}
        return ratio | {
            "shape": "r1-tp8", "routing": routing, "m": m, "provider": provider, "us": us,
            "spread_us": 1.0, "gb_s": 9.0, "tflops": 5.0, "roofline_us": us / 4, "extra_mb": m / 2,
        }  # fmt: skip

    def write(name: str, *rows: dict[str, object], scheme: str = "static") -> None:
        text = {"device": "NVIDIA H100", "scheme": scheme, "rows": rows}
        (tmp_path / name).write_text(json.dumps(text))

    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for make in (script.memory_table, script.skew_table, script.TABLES["prefill"][1]):
        assert make() == "Not measured yet."
    write("moe-h100-r1-tp8.json", row("ours", 64, 225.0))
    write(
        "moe-h100-r1-tp8-prefill.json",
        *(
            row(name, m, us)
            for name, us in (("ours", 700.0), ("humming", 900.0))
            for m in (256, 4096)
        ),
        {"shape": "r1-tp8", "provider": "deepgemm", "m": 4096, "reason": "out of memory"},
    )
    skewed = [row("ours", 4096, us, name) for name, us in (("zipf", 880.0), ("uniform", 800.0))]
    write("moe-h100-prefill-skewed.json", *skewed, row("humming", 4096, 990.0, "zipf"))
    write("moe-h100-prefill-dynamic.json", row("ours", 4096, 710.0), scheme="dynamic_per_token")
    tables = {
        name: script.TABLES[name][1]()
        for name in script.TABLES
        if "ernel" in script.TABLES[name][0]
    }
    assert "225.0" in tables["kernels"] and "700.0" not in tables["kernels"] + tables["peers"]
    assert "| H100 | r1-tp8 | uniform | 4096 | 700.0 |" in tables["prefill"]
    assert "| 25 |" in tables["prefill"] and "225.0" not in tables["prefill"]
    assert "| r1-tp8 | uniform | 4096 | 700.0 | 900.0 (2.00×) |" in tables["prefill-peers"]
    assert "800.0" not in tables["prefill-peers"] and "880.0" in tables["prefill-peers"]
    assert "deepgemm" not in tables["prefill-peers"]
    assert "| H100 | r1-tp8, per token | uniform | 4096 | 710.0 |" in tables["prefill"]
    assert "710.0" not in tables["prefill-peers"], "nothing to compare it with"
    assert "| r1-tp8 | uniform | 4096 | 2048 | 2048 |" in tables["prefill-memory"]
    assert "256" not in tables["prefill-memory"]
    assert "| r1-tp8 | zipf | 4096 | 1.10× |" in tables["prefill-skew"]


def test_limits_of_paths_and_what_they_save(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.tune_table() == "Not measured yet."
    us: dict[str, dict[str, float]] = {"small": {"16": 66.0}, "medium": {"4096": 5.0}}
    us |= {"large": {"16": 44.0, "256": 302.3, "300": 1.0}, "prefill": {"16": 88.0, "256": 283.3}}
    limits = {"small": 5, "medium": 0, "large": 200}
    result = {"shape": "r1-tp8", "variant": "static, 16 codes", "limits": limits, "us": us}
    other = result | {"variant": "per token, 15 codes"}
    (tmp_path / "tune-h100.json").write_text(json.dumps([result, other]))
    head, line, *found = script.tune_table().splitlines()
    limits_of = "`small` to | `medium` to | `large` to | M = 16 |"
    assert head.startswith(f"| Shape | Scales | Codes | {limits_of}")
    assert line.count("|") == head.count("|") == found[0].count("|")
    # What took less than the path of the limits is seen, what neither of them ran is not.
    times = "| 5 | — | 200 | 44.0 (1.50×) | — | 283.3 (1.07×) | — | — |"
    assert found == [f"| r1-tp8 | static | −8…7 {times}", f"| r1-tp8 | per token | −7…7 {times}"]
