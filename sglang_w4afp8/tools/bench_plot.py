"""Results of ``bench moe`` as a picture and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_w4afp8.errors import ConfigError

Row = Mapping[str, Any]

COLOURS = {
    "ours": (200, 30, 30),
    "sglang-cutlass": (40, 90, 200),
    "humming-w4a8": (20, 140, 70),
    "humming-w4a16": (120, 190, 60),
    "sglang-fp8-triton": (230, 140, 20),
    "deepgemm-fp8": (150, 90, 40),
    "flashinfer-w4a8": (130, 60, 170),
    "marlin-w4a16": (0, 160, 180),
    "roofline": (120, 120, 120),
}
_SIZE, _MARGIN = (900, 560), (70, 40, 190, 60)  # left, top, right, bottom


def series(rows: Sequence[Row], routing: str) -> dict[str, list[tuple[int, float]]]:
    """``(M, us)`` by provider, and of the roofline, for the rows that have times."""
    found: dict[str, list[tuple[int, float]]] = {}
    roofline: dict[int, float] = {}
    for row in rows:
        if "us" in row and row["routing"] == routing:
            found.setdefault(row["provider"], []).append((row["m"], row["us"]))
            roofline[row["m"]] = row["roofline_us"]
    if roofline:
        found["roofline"] = list(roofline.items())
    return {name: sorted(points) for name, points in found.items()}


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one shape as one; of a cell that several have, the last counts.

    Raises:
        ConfigError: they are of several cards or shapes.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        for row in result["rows"]:
            rows[row["provider"], row.get("routing"), row.get("m")] = row
    for what, found in (
        ("cards", {result["device"] for result in results}),
        ("shapes", {row["shape"] for row in rows.values()}),
    ):
        if len(found) > 1:
            raise ConfigError(
                f"results of several {what}: {', '.join(sorted(found))}",
                "a picture shows one shape on one card",
                ["sglang-w4afp8 bench plot RESULT PNG with files of one shape, as --out writes"],
            )
    return {**results[-1], "rows": list(rows.values())}


def draw(result: Mapping[str, Any], path: Path, routing: str = "uniform") -> None:
    """Latency over tokens, both axes logarithmic, a line for each provider and the roofline.

    Args:
        result: what a result file holds.
        path: PNG to write.
        routing: whose rows; if there are none, those of the first routing found.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: no row has a time.
    """
    from PIL import Image, ImageDraw

    timed = [row for row in result["rows"] if "us" in row]
    if not timed:
        raise ValueError("no row has a time")
    if all(row["routing"] != routing for row in timed):
        routing = timed[0]["routing"]
    lines = series(timed, routing)
    tokens = sorted({m for points in lines.values() for m, _ in points})
    times = [us for points in lines.values() for _, us in points]
    steps = [factor * 10.0**power for power in range(-2, 9) for factor in (1, 2, 5)]
    bottom_us = max(step for step in steps if step <= min(times))
    top_us = min(step for step in steps if step > max(times))
    low, high = math.log10(bottom_us), math.log10(top_us)
    left, top, right, bottom = _MARGIN
    width, height = _SIZE[0] - left - right, _SIZE[1] - top - bottom
    first, last = math.log2(tokens[0]), math.log2(tokens[-1])

    def at(m: float, us: float) -> tuple[float, float]:
        across = (math.log2(m) - first) / ((last - first) or 1.0)
        up = (math.log10(us) - low) / (high - low)
        return left + across * width, top + (1 - up) * height

    image = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(image)
    for us in (step for step in steps if bottom_us <= step <= top_us):
        y = at(tokens[0], us)[1]
        pen.line([(left, y), (left + width, y)], (225, 225, 225))
        pen.text((left - 45, y - 6), f"{us:g}", "black")
    for m in tokens:
        x = at(m, bottom_us)[0]
        pen.line([(x, top), (x, top + height)], (225, 225, 225))
        pen.text((x - 8, top + height + 6), str(m), "black")
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS.get(name, (0, 0, 0))
        spots = [at(m, us) for m, us in points]
        pen.line(spots, colour, 4 if name == "ours" else 2)
        for x, y in spots:
            pen.ellipse([(x - 3, y - 3), (x + 3, y + 3)], colour)
        y = top + 14 * number
        pen.line([(left + width + 12, y + 6), (left + width + 32, y + 6)], colour, 3)
        pen.text((left + width + 38, y), name, "black")
    shape = timed[0]["shape"]
    pen.text((left, 12), f"{result['device']}  {shape}  {routing} routing, us per layer", "black")
    pen.text((left + width // 2 - 20, _SIZE[1] - 24), "tokens", "black")
    image.save(path, "PNG")


def summary(rows: Sequence[Row]) -> str:
    """A table for the terminal: tokens down, providers across, microseconds and ``× ours``."""
    timed = [row for row in rows if "us" in row]
    names = list(dict.fromkeys(row["provider"] for row in timed))
    lines = []
    for routing in dict.fromkeys(row["routing"] for row in timed):
        lines.append(f"{routing:>10} " + "".join(f"{name:>20}" for name in names))
        of_routing = [row for row in timed if row["routing"] == routing]
        for m in dict.fromkeys(row["m"] for row in of_routing):
            cells = {row["provider"]: row for row in of_routing if row["m"] == m}
            texts = []
            for name in names:
                row = cells.get(name)
                ratio = f" (x{row['times_ours']:.2f})" if row and "times_ours" in row else ""
                texts.append(f"{row['us']:.1f}{ratio}" if row else "-")
            lines.append(f"{m:>10} " + "".join(f"{text:>20}" for text in texts))
    return "\n".join(lines)
