"""``sglang-w4afp8 bench``: ``moe`` times one MoE layer with every kernel present on this card.

``plot`` draws its results; ``tune`` measures which of our paths runs which number of tokens. Exit
code 1 if a kernel disagreed with the oracle.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.tools.bench_environment import command, environment, gpu_word
from sglang_w4afp8.tools.bench_moe import (
    ROUTINGS,
    SHAPES,
    Ceilings,
    Shape,
    measure_ceilings,
    shape_argument,
)
from sglang_w4afp8.tools.bench_peers import PROVIDERS, providers
from sglang_w4afp8.tools.bench_plot import draw, merged, summary
from sglang_w4afp8.tools.bench_run import ContextLost, Measurement, line
from sglang_w4afp8.tools.bench_tune import add_tune_arguments, run_tune

PREFILL_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    kinds = parser.add_subparsers(dest="kind", required=True)
    moe = kinds.add_parser("moe", help="one MoE layer, routing output in, combined BF16 out")
    moe.add_argument(
        "--shape", nargs="+", type=shape_argument, default=[SHAPES["r1-tp8"]],
        help=f"{', '.join(SHAPES)}, or experts=256,hidden=7168,inner=256,top_k=8",
    )  # fmt: skip
    moe.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    moe.add_argument("--routing", nargs="+", choices=tuple(ROUTINGS), default=["uniform"])
    moe.add_argument("--scheme", choices=("static", "dynamic_per_token"), default="static")
    moe.add_argument(
        "--codes",
        type=int,
        choices=(15, 16),
        default=15,
        help="15: −7 … 7, positive scales; 16: −8 … 7, scales of both signs (default: 15)",
    )
    moe.add_argument("--provider", nargs="+", choices=tuple(PROVIDERS), help="only these")
    moe.add_argument("--replays", type=int, default=9)
    moe.add_argument("--weight-sets", type=int, default=2)
    moe.add_argument("--peer-limit", type=float, metavar="S", help="seconds for one peer and shape")
    moe.add_argument("--check-only", action="store_true", help="compare with the oracle, no timing")
    moe.add_argument(
        "--check-seconds", type=float, default=2.0, metavar="S",
        help="for one layer's oracle; a call of over 2048 tokens is then compared in part",
    )  # fmt: skip
    moe.add_argument("--json", type=Path, help="write all rows into this file")
    moe.add_argument(
        "--out", type=Path,
        help="write moe-GPU-SHAPE.json and .png into this folder; with 256 tokens and more only, "
        "moe-GPU-SHAPE-prefill.json",
    )  # fmt: skip
    moe.add_argument("--commit", help="of this package; asked from git by default")
    plot = kinds.add_parser("plot", help="draw result files of one shape: latency over tokens")
    plot.add_argument("result", type=Path, nargs="+")
    plot.add_argument("png", type=Path)
    add_tune_arguments(
        kinds.add_parser(
            "tune", help="which path from how many tokens on, for servers on this card"
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m sglang_w4afp8.tools.bench``: the command without ``sglang-w4afp8`` around it.

    Args:
        argv: arguments after ``bench``; None takes ``sys.argv``.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="sglang-w4afp8 bench", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if a kernel was wrong or there is no GPU."""
    return {"moe": _moe, "plot": _plot, "tune": run_tune}[options.kind](options)


def _plot(options: argparse.Namespace) -> int:
    draw(merged([json.loads(path.read_text()) for path in options.result]), options.png)
    return 0


def _moe(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("sglang-w4afp8 bench moe: no CUDA device is visible to torch", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    ceilings = Ceilings(1.0, 1.0, 1.0) if options.check_only else measure_ceilings()
    report: dict[str, Any] = {
        **environment(options.commit),
        "command": command(sys.argv[1:]),
        "ceilings": None if options.check_only else asdict(ceilings),
        "scheme": options.scheme,
        "codes": options.codes,
        "routings": {name: ROUTINGS[name] for name in options.routing},
        "rows": [],
    }
    measured = ", ".join(f"{name} {value:.0f}" for name, value in asdict(ceilings).items())
    print("no timing" if options.check_only else measured, flush=True)
    for shape in options.shape:
        _bench_shape(shape, options, Measurement(options, ceilings), report)
    return 1 if any(row.get("wrong") for row in report["rows"]) else 0


def _stem(device: str, shape: str, tokens: Sequence[int]) -> str:
    """A result's file name: runs of large calls only keep apart from those of decoding."""
    return f"moe-{gpu_word(device)}-{shape}" + ("-prefill" if min(tokens) >= PREFILL_TOKENS else "")


def _bench_shape(
    shape: Shape, options: argparse.Namespace, measurement: Measurement, report: dict[str, Any]
) -> None:
    """Add the rows of all providers; what is known is on disk after each."""
    before, lost = len(report["rows"]), None
    measurement.load(shape)
    for provider in providers(options.provider):
        rows: list[dict[str, Any]] = []
        if lost is not None:
            rows.append({"shape": shape.name, "provider": provider.name, "reason": lost})
        else:
            try:
                measurement.provider(provider, rows)
            except ContextLost as error:
                lost = f"{provider.name} left the CUDA context unusable: {error}"
        for row in rows:
            if "us" not in row:
                print(line(row), flush=True)
        report["rows"] += rows
        _write(shape, options, report, report["rows"][before:])
    print(summary(report["rows"][before:]), flush=True)
    if lost is not None:
        raise ConfigError("bench moe", lost, ["run again without it: --provider …"])


def _write(
    shape: Shape, options: argparse.Namespace, report: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / _stem(report["device"], shape.name, options.tokens)
        result = report | {"rows": rows}
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        if any("us" in row for row in rows):
            try:
                draw(result, stem.with_suffix(".png"))
            except ModuleNotFoundError as error:
                print(
                    f"no picture: {error}; later: sglang-w4afp8 bench plot {stem}.json {stem}.png"
                )


if __name__ == "__main__":
    raise SystemExit(main())
