"""What each rounding method keeps of weights of different tails: the table in docs/convert.md.

Weights are drawn from Gaussian, Laplace and Student-t distributions, 1024 x 4096, as FP8 128x128
(what DeepSeek ships) and as BF16; the figure is the signal-to-noise ratio against the source as
stored, in dB. Deterministic.

Beside each method stands the bound of its range of codes: every group with the best of 1200 scales
(two signs of each with −8…7), unrounded, which no method that works group by group can exceed.

    python benchmarks/rounding_snr.py --output benchmarks/results/rounding_snr.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sglang_w4afp8
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.reference import dequantize_fp8_block
from sglang_w4afp8.testing.checkpoints import to_fp8_blocks
from sglang_w4afp8.tools.rewrite import one_thread

SHAPE = (1024, 4096)
DISTRIBUTIONS = ("Gauss", "Laplace", "Student t5", "Student t3")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "mse": {"method": "mse"},
    "mse --symmetric-range": {"method": "mse", "symmetric": True},
}
# Smallest and largest code that the largest weight of a group may fall on, and how many between.
BOUND_GRID = (4.0, 40.0, 1200)
BOUND_ROWS = 128


def draw(name: str) -> torch.Tensor:
    """Weights of one distribution, scaled to about 0.02."""
    torch.manual_seed(0)
    if name == "Gauss":
        return torch.randn(SHAPE) * 0.02
    if name == "Laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(SHAPE) * 0.02
    freedom = float(name.removeprefix("Student t"))
    return torch.distributions.StudentT(freedom).sample(SHAPE) * 0.02


def bound(weight: torch.Tensor, group_size: int, *, symmetric: bool) -> float:
    """SNR in dB of the best scale for every group of ``(N, K)`` float32 weights.

    With codes q the least-squares scale leaves ⟨w,w⟩ − ⟨w,q⟩²/⟨q,q⟩.
    """
    low, signs = (-7.0, (1.0,)) if symmetric else (-8.0, (1.0, -1.0))
    groups = weight.view(-1, group_size)
    unit = groups.abs().amax(dim=-1, keepdim=True).reciprocal()
    best = torch.zeros(groups.shape[0])
    first, last, steps = BOUND_GRID
    for step in range(steps):
        multiplier = first * (last / first) ** (step / (steps - 1))
        for sign in signs:
            codes = (groups * (unit * (sign * multiplier))).round_().clamp_(low, 7.0)
            dot = torch.linalg.vecdot(groups, codes)
            best = torch.maximum(best, dot * dot / torch.linalg.vecdot(codes, codes))
    signal = torch.linalg.vecdot(groups, groups)
    error = (signal.double() - best.double()).sum()
    return 10.0 * math.log10(float(signal.double().sum() / error))


def bounds(source: str) -> list[dict[str, Any]]:
    """What the two ranges of codes could gain over ``rtn`` at best, on a part of the weights."""
    rows = []
    for name in DISTRIBUTIONS:
        stored = draw(name)[:BOUND_ROWS].contiguous()
        weight = stored.to(torch.bfloat16).to(torch.float32)
        if source == "fp8":
            weight = dequantize_fp8_block(*to_fp8_blocks(stored), (128, 128), torch.float32)
        for group_size in (128, 64, 32):
            _, _, plain = quantize_weight(weight, method="rtn", group_size=group_size)
            row: dict[str, Any] = {"weights": name, "source": source, "group_size": group_size}
            for label, symmetric in (("-8..7", False), ("-7..7", True)):
                gain = bound(weight, group_size, symmetric=symmetric) - plain.snr_db
                row[f"largest gain, {label}"] = round(gain, 2)
            rows.append(row)
    return rows


def table(source: str, names: Sequence[str] = DISTRIBUTIONS) -> list[dict[str, Any]]:
    """SNR of every distribution, group size and method."""
    rows = []
    for name in names:
        weight = draw(name)
        data, scale = weight.to(torch.bfloat16), None
        if source == "fp8":
            data, scale = to_fp8_blocks(weight)
        for group_size in (128, 64, 32):
            row: dict[str, Any] = {"weights": name, "source": source, "group_size": group_size}
            for label, options in METHODS.items():
                _, _, stats = quantize_weight(
                    data,
                    scale,
                    None if scale is None else (128, 128),
                    group_size=group_size,
                    **options,
                )
                row[label] = round(stats.snr_db, 2)
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in the documentation."""
    lines = [
        "| weights | group | rtn | mse | mse --symmetric-range | gain | gain, symmetric |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plain, search, less = (row[label] for label in METHODS)
        lines.append(
            f"| {row['weights']} | {row['group_size']} | {plain:.2f} | {search:.2f} | {less:.2f} "
            f"| +{search - plain:.2f} | +{less - plain:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with one_thread():
        rows = {source: table(source) for source in ("fp8", "bf16")}
        limits = bounds("fp8") + bounds("bf16")
    for source, part in rows.items():
        print(f"source {source}\n\n{markdown(part)}\n")
    for row in limits:
        print(row)
    if options.output:
        document = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sglang_w4afp8": sglang_w4afp8.__version__,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "shape": SHAPE,
            "unit": "dB",
            "rows": rows["fp8"] + rows["bf16"],
            "bound_rows": BOUND_ROWS,
            "bounds": limits,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
