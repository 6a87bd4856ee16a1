"""What each rounding method keeps of weights of different tails: the table in docs/convert.md.

Weights are drawn from Gaussian, Laplace and Student-t distributions, 1024 x 4096, as FP8 128x128
(what DeepSeek ships) and as BF16; the figure is the signal-to-noise ratio against the source as
stored, in dB. Deterministic.

    python benchmarks/rounding_snr.py --output benchmarks/results/rounding_snr.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sglang_w4afp8
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.testing.checkpoints import to_fp8_blocks
from sglang_w4afp8.tools.rewrite import one_thread

SHAPE = (1024, 4096)
DISTRIBUTIONS = ("Gauss", "Laplace", "Student t5", "Student t3")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "mse": {"method": "mse"},
    "mse --full-range": {"method": "mse", "full_range": True},
}


def draw(name: str) -> torch.Tensor:
    """Weights of one distribution, scaled to about 0.02."""
    torch.manual_seed(0)
    if name == "Gauss":
        return torch.randn(SHAPE) * 0.02
    if name == "Laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(SHAPE) * 0.02
    freedom = float(name.removeprefix("Student t"))
    return torch.distributions.StudentT(freedom).sample(SHAPE) * 0.02


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
        "| weights | group | rtn | mse | mse --full-range | gain | gain, full range |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plain, search, full = (row[label] for label in METHODS)
        lines.append(
            f"| {row['weights']} | {row['group_size']} | {plain:.2f} | {search:.2f} | {full:.2f} "
            f"| +{search - plain:.2f} | +{full - plain:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with one_thread():
        rows = {source: table(source) for source in ("fp8", "bf16")}
    for source, part in rows.items():
        print(f"source {source}\n\n{markdown(part)}\n")
    if options.output:
        document = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sglang_w4afp8": sglang_w4afp8.__version__,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "shape": SHAPE,
            "unit": "dB",
            "rows": rows["fp8"] + rows["bf16"],
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
