"""The verification report as a page and as a picture: SNR by layer and projection.

No plotting library: the page is HTML with an inline SVG, the picture a PNG written by hand.
"""

from __future__ import annotations

import html
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_w4afp8.checkpoint.names import PROJECTIONS
from sglang_w4afp8.quantize.metrics import LOSSLESS_DB

Layers = Mapping[int, Mapping[str, float]]

# Red to green over the range that honest INT4 rounding covers.
_LOW_DB, _HIGH_DB = 10.0, 24.0
_CELL = 18


def colour(snr_db: float) -> tuple[int, int, int]:
    """Colour of a cell: red at 10 dB, yellow between, green at 24 dB, blue when lossless."""
    if snr_db >= LOSSLESS_DB:
        return 70, 120, 200
    part = min(1.0, max(0.0, (snr_db - _LOW_DB) / (_HIGH_DB - _LOW_DB)))
    if part < 0.5:
        return 205, round(60 + 290 * part), 60
    return round(205 - 290 * (part - 0.5)), 205, 60


def heat_map_svg(layers: Layers) -> str:
    """One column per layer, one row per projection."""
    cells = []
    for x, layer in enumerate(layers):
        for y, projection in enumerate(PROJECTIONS):
            value = layers[layer].get(projection)
            if value is None:
                continue
            red, green, blue = colour(value)
            cells.append(
                f'<rect x="{60 + x * _CELL}" y="{4 + y * _CELL}" width="{_CELL - 1}" '
                f'height="{_CELL - 1}" fill="rgb({red},{green},{blue})">'
                f"<title>layer {layer} {projection}: {value:.2f} dB</title></rect>"
            )
        if x % 5 == 0:
            cells.append(f'<text x="{62 + x * _CELL}" y="{18 + 3 * _CELL}">{layer}</text>')
    for y, projection in enumerate(PROJECTIONS):
        cells.append(f'<text x="4" y="{17 + y * _CELL}">{projection}</text>')
    width, height = 70 + len(layers) * _CELL, 24 + 3 * _CELL
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(cells)}</svg>'
    )


def write_html(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: file.
        report: :class:`~.verify.VerifyReport` as a dict.
    """
    is_good = not report["problems"] and not report["below_threshold"]
    worst = "".join(
        f"<tr><td>{html.escape(item['name'])}</td><td>{item['snr_db']:.2f}</td>"
        f"<td>{item['cosine']:.5f}</td></tr>"
        for item in report["worst"]
    )
    problems = "".join(f"<li>{html.escape(text)}</li>" for text in report["problems"][:200])
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>W4AFP8 verification</title>"
        "<style>body{font:14px sans-serif;margin:2em}td{padding:1px 12px}</style>"
        f"<h1>{'Good' if is_good else 'Not good'}</h1>"
        f"<p>{html.escape(report['source'])} → {html.escape(report['target'])}</p>"
        f"<p>{report['linears_compared']} linears compared, {report['copies_compared']} tensors "
        f"equal bit for bit. Experts: {report['overall_snr_db']:.2f} dB, cosine "
        f"{report['overall_cosine']:.5f}; {report['below_threshold']} below "
        f"{report['threshold_db']:g} dB.</p>"
        f"<h2>SNR by layer and projection</h2>{heat_map_svg(report['layers'])}"
        "<p>Red 10 dB, green 24 dB, blue lossless; the pointer shows numbers.</p>"
        f"<h2>Worst</h2><table><tr><td>matrix<td>dB<td>cosine</tr>{worst}</table>"
        f"<h2>Problems</h2><ul>{problems or '<li>none</li>'}</ul>\n",
        encoding="utf-8",
    )


def write_png(path: Path, layers: Layers) -> None:
    """Write the heat map as an RGB PNG: one column per layer, three rows."""
    rows = []
    for projection in PROJECTIONS:
        line = b""
        for cells in layers.values():
            value = cells.get(projection)
            line += bytes(colour(value) if value is not None else (230, 230, 230)) * _CELL
        rows.extend([b"\0" + line] * _CELL)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", len(layers) * _CELL, len(rows), 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(b"".join(rows), 9))
        + chunk(b"IEND", b"")
    )
