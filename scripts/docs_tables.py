"""Rewrites the generated tables in ``docs/`` and the README: ``python scripts/docs_tables.py``.

A table stands between ``<!-- NAME: generated … -->`` and ``<!-- /NAME -->``; a test compares what
stands there with what this makes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sglang_w4afp8 import env
from sglang_w4afp8.hooks import HOOKS
from sglang_w4afp8.kernels.hopper.plan import Limits
from sglang_w4afp8.kernels.support import support_table
from sglang_w4afp8.tools.bench_choose import path_of

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."


def variables_table() -> str:
    """Every environment variable of this package."""
    lines = ["| Variable | Default | Values | Effect |", "|---|---|---|---|"]
    for variable in env.VARIABLES:
        default = f"`{variable.default}`" if variable.default else "unset"
        values = " ".join(f"`{choice}`" for choice in variable.choices) or "free text"
        lines.append(f"| `{variable.name}` | {default} | {values} | {variable.effect} |")
    return "\n".join(lines)


def hooks_table() -> str:
    """Every upstream name this package relies on."""
    lines = ["| Used by | SGLang name | Kind | For |", "|---|---|---|---|"]
    for hook in HOOKS:
        target = hook.target.removeprefix("sglang.srt.")
        lines.append(f"| `{hook.used_by}` | `{target}` | {hook.kind} | {hook.why} |")
    return "\n".join(lines)


def served_table() -> str:
    """What ``sglang-w4afp8 demo --out`` found, from the committed result files."""
    lines = [
        "| Architecture | Device | SGLang | TP | Greedy tokens | Largest logprob difference | "
        "Mean over a given text |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("serve-*.json")):
        result = json.loads(path.read_text())
        for model, runs in result["served"].items():
            for run in runs:
                title = f"tp {run['tp']}" + (f" {run['backend']}" * (run["backend"] != "auto"))
                found = result["against_transformers"][f"{model}: {title}"]
                largest = found["largest_logprob_difference"]
                lines.append(
                    f"| {model} | {result['device']} | {result['versions']['sglang']} | "
                    f"{title.removeprefix('tp ')} | "
                    f"{'identical' if found['tokens_identical'] else 'differ'} | "
                    f"{'—' if largest is None else format(largest, '.1e')} | "
                    f"{found['mean_forced_logprob_difference']:.1e} |"
                )
    return "\n".join(lines)


def moe_results(prefill: bool = False) -> dict[str, dict[str, Any]]:
    """Result files of ``bench moe`` by name, shapes in the order of their numbers.

    Args:
        prefill: ``moe-*-prefill*.json``; otherwise all other ``moe-*.json``.
    """
    files = [path for path in RESULTS.glob("moe-*.json") if ("-prefill" in path.stem) == prefill]

    def order(path: Path) -> tuple[Any, ...]:
        # What is of one shape is its shape's own run: it comes before runs for a purpose.
        purpose = re.search(r"-prefill-\w+$|skewed", path.stem) is not None
        return purpose, [int(n) for n in re.findall(r"\d+", path.stem)], path.stem

    return {path.name: json.loads(path.read_text()) for path in sorted(files, key=order)}


def timed_rows(prefill: bool) -> list[dict[str, Any]]:
    """The rows with times; of a cell that several files have, the first counts."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in moe_results(prefill).values():
        device = result["device"].removeprefix("NVIDIA ")
        for row in result["rows"]:
            if row.get("us") is not None:
                shape = row["shape"] + (", −8…7" if result.get("codes") == 16 else "")
                shape += ", per token" if result.get("scheme") == "dynamic_per_token" else ""
                key = shape, row["routing"], row["m"], row["provider"]
                rows.setdefault(key, row | {"shape": shape, "device": device})
    return list(rows.values())


def peers_table(prefill: bool = False) -> str:
    """Every kernel's microseconds in one run, and how many times ours that is.

    Calls of which only one kernel was timed are left out.
    """
    rows = timed_rows(prefill)
    timed = Counter((row["shape"], row["routing"], row["m"]) for row in rows)
    compared = [row for row in rows if timed[row["shape"], row["routing"], row["m"]] > 1]
    return _by_provider(compared, _times_ours)


def humming_table() -> str:
    """The same of ``peers-*-prefill.json``, one run a shape, from 256 tokens on."""
    files = sorted(RESULTS.glob("peers-*-prefill.json"), key=lambda path: len(path.stem))
    rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
    return _by_provider([row for row in rows if row.get("us") is not None], _times_ours)


def tune_table() -> str:
    """``benchmarks/results/tune-h100.json``: limits, microseconds, the next path's over those."""
    path = RESULTS / "tune-h100.json"
    if not path.exists():
        return NOT_MEASURED
    head = ["Shape", "Scales", "Codes", *(f"`{name}` to" for name in Limits._fields)]
    sizes = (16, 64, 256, 1024, 4096)
    lines = ["| " + " | ".join([*head, *(f"M = {m}" for m in sizes)]) + " |"]
    lines.append("|---|---|---|" + "--:|" * (len(Limits._fields) + len(sizes)))
    for result in json.loads(path.read_text()):
        limits = Limits(**result["limits"])
        scales, codes = result["variant"].split(", ")
        cells = [result["shape"], scales, "−8…7" if codes == "16 codes" else "−7…7"]
        cells += [str(most or "—") for most in limits]
        for m in sizes:
            timed = {name: us[str(m)] for name, us in result["us"].items() if str(m) in us}
            mine = timed.pop(path_of(limits, m), None)
            times = f" ({min(timed.values()) / mine:.2f}×)" if mine and timed else ""
            cells.append(f"{mine:.1f}{times}" if mine else "—")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times_ours(row: dict[str, Any]) -> str:
    ratio = f" ({row['times_ours']:.2f}×)" if "times_ours" in row else ""
    return f"{row['us']:.1f}{ratio}"


def memory_table() -> str:
    """Every kernel's extra memory in calls of 1024 tokens and more, in MB."""
    large = [row for row in timed_rows(True) if row["m"] >= 1024 and "extra_mb" in row]
    return _by_provider(large, lambda row: f"{row['extra_mb']:.0f}")


def skew_table() -> str:
    """How many times longer a call takes than with uniform routing in the same run."""
    skewed = []
    for result in moe_results(prefill=True).values():
        rows = [row for row in result["rows"] if row.get("us") is not None]
        even = {
            (row["shape"], row["m"], row["provider"]): row["us"]
            for row in rows
            if row["routing"] == "uniform"
        }
        for row in rows:
            us = even.get((row["shape"], row["m"], row["provider"]))
            if us is not None and row["routing"] != "uniform":
                skewed.append(row | {"slower": row["us"] / us})
    return _by_provider(skewed, lambda row: f"{row['slower']:.2f}×")


def _by_provider(rows: list[dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> str:
    if not rows:
        return NOT_MEASURED
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [
        "| Shape | Routing | M | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---|---|--:|" + "--:|" * len(names),
    ]
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault((row["shape"], row["routing"], row["m"]), {})
        line[row["provider"]] = text(row)
    for (shape, routing, m), line in cells.items():
        texts = " | ".join(line.get(name, "—") for name in names)
        lines.append(f"| {shape} | {routing} | {m} | {texts} |")
    return "\n".join(lines)


def kernels_table(prefill: bool = False) -> str:
    """Our kernels' rows of ``benchmarks/results/moe-*.json``."""
    ours = [row for row in timed_rows(prefill) if row["provider"] == "ours"]
    if not ours:
        return NOT_MEASURED
    bound = "roofline" if prefill else "read"
    lines = [
        f"| Device | Shape | Routing | M | us | ± us | GB/s | TFLOPS | % of {bound} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['device']} | {row['shape']} | {row['routing']} "
        f"| {row['m']} | {row['us']:.1f} | {row['spread_us']:.1f} | {row['gb_s']:.0f} | "
        f"{row['tflops']:.1f} | {100 * row['roofline_us'] / row['us']:.0f} |"
        for row in ours
    ]
    return "\n".join(lines)


def scaling_table() -> str:
    """The estimates of ``benchmarks/results/scaling-on-paper.json``, one row a layout."""
    lines = [
        "| Card | Network | TP | Weights read, GB | ITL, ms | ITL, ms, batch 128 | "
        "with EP, ms | tok/s per GPU |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    path = RESULTS / "scaling-on-paper.json"
    rows = {
        (row["gpu"], row["fabric"], row["tp"], row["batch"]): row
        for row in json.loads(path.read_text())["rows"]
        if row["fits"]
    }
    for (gpu, fabric, tp, batch), one in rows.items():
        if batch != 1:
            continue
        many = rows[gpu, fabric, tp, 128]
        ep = f"{many['ep_itl_ms']:.1f}" if many["ep_fits"] else "no room"
        lines.append(
            f"| {gpu.upper()} | {fabric} | {tp} | {one['weight_bytes'] / 1e9:.1f} / "
            f"{many['weight_bytes'] / 1e9:.1f} | {one['itl_ms']:.1f} | {many['itl_ms']:.1f} = "
            f"{many['read_ms']:.1f} + {many['exchange_ms']:.1f} | {ep} | "
            f"{many['tok_s_gpu']:.0f} |"
        )
    return "\n".join(lines)


def cutlass_table() -> str:
    """SGLang's own W4AFP8 kernel in ``benchmarks/results/moe-*.json``: uniform, codes −7 … 7."""
    lines = [
        "| Shape | M | us | Device | SGLang | sglang-kernel | Commit | File |",
        "|---|--:|--:|---|---|---|---|---|",
    ]
    for name, result in moe_results().items():
        libraries = result.get("libraries", {})
        if result.get("codes") == 16:
            continue
        for row in result["rows"]:
            timed = row.get("us") is not None and row["routing"] == "uniform"
            if row["provider"] == "sglang-cutlass" and timed:
                lines.append(
                    f"| {row['shape']} | {row['m']} | {row['us']:.1f} | {result['device']} | "
                    f"{libraries.get('sglang', '—')} | {libraries.get('sglang-kernel', '—')} | "
                    f"`{result['commit'][:7]}` | `{name}` |"
                )
    return "\n".join(lines)


def l2_table() -> str:
    """``benchmarks/results/l2-reductions-h100.json``: random rows of 128 bytes, GB/s."""
    path = RESULTS / "l2-reductions-h100.json"
    if not path.exists():
        return NOT_MEASURED
    rows = json.loads(path.read_text())["rows"]
    regions = [4, 24, 512]
    lines = ["| | 4 MB | 24 MB | 512 MB |", "|---|--:|--:|--:|"]
    kinds = {
        "bulk store": "bulk stores",
        "bulk bf16": "bulk reductions, BF16",
        "bulk f32": "bulk reductions, FP32",
        "bulk u64": "bulk reductions, 64-bit integers",
        "lanes v4.f32": "`red` of lanes, FP32 × 4",
        "lanes u64": "`red` of lanes, 64-bit integers",
    }
    for kind, text in kinds.items():
        rates = {
            row["region_mb"]: row["gb_s"]
            for row in rows
            if row["kind"] == kind and row["row_bytes"] == 128
        }
        lines.append(f"| {text} | " + " | ".join(f"{rates[mb]}" for mb in regions) + " |")
    return "\n".join(lines)


def rows_table() -> str:
    """``dispatched-rows-h100*.json``: layers on what a dispatcher sends, microseconds."""
    times: dict[tuple[bool, int, int], dict[str, float]] = {}
    for path in sorted(RESULTS.glob("dispatched-rows-h100*.json")):
        for row in json.loads(path.read_text())["rows"]:
            cell = times.setdefault((row["dynamic"], row["m"], row["received"]), {})
            cell[f"{row['rows']} {row['path']}"] = row["layer_us"]
    if not times:
        return NOT_MEASURED
    columns = {
        "received large": "BF16, `large`",
        "received prefill": "BF16, `prefill`",
        "e4m3 large": "E4M3, `large`",
        "e4m3 prefill": "E4M3, `prefill`",
    }
    lines = [
        "| Scheme | M of all ranks | rows here | " + " | ".join(columns.values()) + " |",
        "|---|--:|--:|" + "--:|" * len(columns),
    ]
    for (dynamic, m, received), cell in sorted(times.items()):
        found = " | ".join(f"{cell[name]:.1f}" if name in cell else "—" for name in columns)
        lines.append(f"| {'per token' if dynamic else 'static'} | {m} | {received} | {found} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "cutlass": ("../patches/cover-letter.md", cutlass_table),
    "variables": ("configuration.md", variables_table),
    "hooks": ("compatibility.md", hooks_table),
    "support": ("../README.md", support_table),
    "served": ("../README.md", served_table),
    "kernels": ("kernels.md", kernels_table),
    "peers": ("kernels.md", peers_table),
    "tune": ("kernels.md", tune_table),
    "prefill": ("kernels.md", partial(kernels_table, True)),
    "prefill-peers": ("kernels.md", partial(peers_table, True)),
    "prefill-humming": ("kernels.md", humming_table),
    "prefill-skew": ("kernels.md", skew_table),
    "prefill-memory": ("kernels.md", memory_table),
    "rows": ("kernels.md", rows_table),
    "l2": ("kernels.md", l2_table),
    "scaling": ("multi-node.md", scaling_table),
}


def with_table(text: str, name: str, table: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    pattern = rf"(<!-- {name}: generated[^>]*-->\n).*?(<!-- /{name} -->)"
    result, count = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} places for the table {name!r}")
    return result


def main() -> int:
    """Write all tables."""
    for name, (file, make) in TABLES.items():
        path = DOCS / file
        path.write_text(with_table(path.read_text(), name, make()))
        print(f"{path.name}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
