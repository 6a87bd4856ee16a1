"""``sglang-w4afp8 bench moe``: one MoE layer, every kernel present, this card.

Exit code 1 if a kernel disagreed with the oracle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8 import __version__
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.bench_moe import (
    SHAPES,
    Call,
    Ceilings,
    Shape,
    call_count,
    graph_times_us,
    hit_experts,
    measure_ceilings,
    oracle,
    random_calls,
    random_weights,
    relative_error,
    spread,
)
from sglang_w4afp8.tools.bench_peers import Provider, providers

TOLERANCE = 1e-2
"""Relative L2 error above which a kernel counts as wrong. BF16 intermediates alone give 2e-3."""


def parser() -> argparse.ArgumentParser:
    """The options of ``bench``."""
    result = argparse.ArgumentParser(prog="sglang-w4afp8 bench", description=__doc__)
    kinds = result.add_subparsers(dest="kind", required=True)
    moe = kinds.add_parser("moe", help="one MoE layer, routing output in, combined BF16 out")
    moe.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["r1-tp8"])
    moe.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    moe.add_argument("--routing", nargs="+", choices=("uniform", "zipf", "hot"))
    moe.add_argument("--scheme", choices=("static", "dynamic_per_token"), default="static")
    moe.add_argument("--provider", nargs="+", help="only these")
    moe.add_argument("--replays", type=int, default=9)
    moe.add_argument("--weight-sets", type=int, default=2)
    moe.add_argument("--json", type=Path, help="write results here")
    moe.add_argument("--commit", help="of this package; asked from git by default")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench.

    Args:
        argv: arguments after ``bench``; None takes ``sys.argv``.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    if not torch.cuda.is_available():
        print("sglang-w4afp8 bench moe: no CUDA device is visible to torch", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    report: dict[str, Any] = {
        **environment(options.commit),
        "command": "sglang-w4afp8 bench " + " ".join(Path(word).name for word in words),
        "ceilings": asdict(ceilings),
        "scheme": options.scheme,
        "rows": [],
    }
    print(", ".join(f"{name} {value:.0f}" for name, value in asdict(ceilings).items()), flush=True)
    for name in options.shape:
        report["rows"] += _bench_shape(SHAPES[name], options, ceilings)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(row.get("wrong") for row in report["rows"]) else 0


def environment(commit: str | None) -> dict[str, Any]:
    """What a result needs to explain itself; ``commit`` None asks git."""
    if commit is None:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        commit = done.stdout.strip() or "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sglang_w4afp8": __version__,
        "commit": commit,
    }


def _bench_shape(
    shape: Shape, options: argparse.Namespace, ceilings: Ceilings
) -> list[dict[str, Any]]:
    scheme = ActivationScheme(options.scheme)
    sets = [random_weights(shape, scheme, seed) for seed in range(options.weight_sets)]
    rows = []
    for provider in providers():
        if options.provider and provider.name not in options.provider:
            continue
        reason = provider.why_not(shape, scheme)
        if reason is not None:
            row = {"shape": shape.name, "provider": provider.name, "reason": reason}
            rows.append(row)
            print(f"{shape.name:14} {provider.name:18} not run: {reason}", flush=True)
            continue
        rows += _bench_provider(shape, scheme, provider, sets, options, ceilings)
        torch.cuda.empty_cache()
    return rows


def _bench_provider(
    shape: Shape,
    scheme: ActivationScheme,
    provider: Provider,
    sets: list[MoEWeights],
    options: argparse.Namespace,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    runs = [provider.prepare(shape, scheme, weights) for weights in sets]
    rows = []
    for routing in options.routing or ["uniform"]:
        for tokens in options.tokens:
            count = call_count(shape, tokens)
            calls = random_calls(shape, tokens, routing, count, seed=tokens)
            wrong = 0.0
            for number in range(len(sets)):
                out = runs[number](calls[number])
                error = relative_error(out, oracle(sets[number], calls[number], scheme))
                wrong = error if not error <= wrong else wrong
            row: dict[str, Any] = {
                "shape": shape.name,
                "m": tokens,
                "routing": routing,
                "provider": provider.name,
                "error": wrong,
                "wrong": not wrong < TOLERANCE,
            }
            rows.append(row)
            if row["wrong"]:
                print(f"{shape.name} {provider.name} M={tokens}: error {wrong:.2e}, not timed")
                continue

            def body(calls: list[Call] = calls) -> list[torch.Tensor]:
                return [runs[i % len(runs)](call) for i, call in enumerate(calls)]

            us, spread_us = spread(graph_times_us(body, count, options.replays))
            weight_bytes = hit_experts(calls) * shape.expert_bytes
            pairs = sum(int((call.topk_ids >= 0).sum()) for call in calls) / count
            flops = pairs * 6 * shape.inner * shape.hidden
            row |= {
                "us": us,
                "spread_us": spread_us,
                "calls": count,
                "weight_bytes": weight_bytes,
                "gb_s": weight_bytes / us / 1e3,
                "tflops": flops / us / 1e6,
                "roofline_us": ceilings.roofline_us(weight_bytes, flops),
            }
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:14} {row['provider']:18} {row['routing']:8} M={row['m']:<6}"
        f"{row['us']:9.1f} us ±{row['spread_us']:5.1f} {row['gb_s']:7.0f} GB/s "
        f"{row['tflops']:7.1f} TFLOPS {100 * row['roofline_us'] / row['us']:5.0f} % of roofline "
        f"error {row['error']:.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
