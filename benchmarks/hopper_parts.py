"""Where a layer's time goes: each launch of the Hopper kernels alone, and whole-layer variants.

    python benchmarks/hopper_parts.py --shape r1-tp8 r1-tp16 --tokens 1 16 64 --json parts.json

With ``--parts``, one launch is repeated with all arguments of a completed call, without the others
around it and without early start, so parts add up to more than the layer. Launches of ``prefill``
count items that their predecessors reset: there, the first one, two and three are timed together.

With ``--rows received`` or ``e4m3`` a call has those of its tokens that have an expert here, as a
dispatcher sends them, in BF16, or in E4M3 with a scale per 128 columns; M still counts all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.kernels.hopper import launch
from sglang_w4afp8.kernels.hopper.layout import shuffle_in_place
from sglang_w4afp8.kernels.hopper.plan import Layer, Plan
from sglang_w4afp8.kernels.hopper.plan_prefill import takes_row_scales
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.testing.dispatch import quantize_rows
from sglang_w4afp8.tools import bench_moe
from sglang_w4afp8.tools.bench import environment


def _tuned(words: list[str]) -> Callable[[Plan], Plan]:
    """A plan with other sizes, say ``up_ring=3 down_ring=5 up_ctas=132 down_ctas=132``."""
    wishes = {name: int(value) for name, _, value in (word.partition("=") for word in words)}

    def tune(chosen: Plan) -> Plan:
        launches = list(chosen.launches)
        first = 0 if chosen.path == "small" else 1
        for number, side in ((first, "up"), (first + 1, "down")):
            old = launches[number]
            ring = wishes.get(f"{side}_ring", old.ring)
            # Tokens that stay in shared memory come before the ring and do not change with it.
            held = old.tokens * wishes["hidden"] if chosen.path == "small" and side == "up" else 0
            shared = held + (old.shared_bytes - held) // old.ring * ring
            grid = (wishes.get(f"{side}_ctas", old.grid[0]), 1)
            if chosen.path != "large" and side == "down":
                grid, shared, ring = old.grid, old.shared_bytes, old.ring
            launches[number] = replace(old, ring=ring, shared_bytes=shared, grid=grid)
        return replace(chosen, launches=tuple(launches))

    return tune


def _measure(
    shape: bench_moe.Shape, tokens: int, path: str, options: argparse.Namespace
) -> dict[str, Any]:
    dynamic = options.dynamic
    tune = _tuned([*options.tune, f"hidden={shape.hidden}"])
    scheme = ActivationScheme.DYNAMIC_PER_TOKEN if dynamic else ActivationScheme.STATIC
    layer = Layer(
        shape.experts, shape.hidden, shape.inner, shape.group, shape.inner_group, shape.top_k,
        False, dynamic,
    )  # fmt: skip
    weights, wanted = [], []
    count = bench_moe.call_count(shape, tokens)
    calls = bench_moe.random_calls(shape, tokens, "uniform", count, seed=tokens)
    if options.rows != "all":
        calls = [_received(call) for call in calls]
        if not all(len(call.x) for call in calls):
            raise SystemExit(f"no token of some call of {tokens} has an expert here: ask for more")
    if options.rows == "e4m3" and (path not in _E4M3_PATHS or not takes_row_scales(layer)):
        raise SystemExit(f"{shape.name}: E4M3 rows cannot take the path {path}")
    scaled = [quantize_rows(c.x) if options.rows == "e4m3" else (c.x, None) for c in calls]
    calls = [replace(call, x=x) for call, (x, _) in zip(calls, scaled, strict=True)]
    for seed in range(2):
        loaded, call = _weights(shape, scheme, seed), calls[seed]
        routing = (call.topk_weights, call.topk_ids)
        x_scale = scaled[seed][1]
        wanted.append(moe_reference(call.x, loaded[0], *routing, scheme=scheme, x_scale=x_scale))
        weights.append(loaded[1])
    work, outs = [], []
    for number, call in enumerate(calls):
        w = weights[number % 2]
        tensors = launch.Tensors(
            call.x, call.topk_weights, call.topk_ids, w.w13, w.w13_scale, w.w2, w.w2_scale,
            w.w13_input_scale, w.w2_input_scale, w.state, scaled[number][1],
        )  # fmt: skip
        outs.append(torch.full(call.x.shape, float("nan"), device="cuda").bfloat16())
        work.append(launch.launches(layer, tensors, outs[-1], 1.0, path, tune))
    device = calls[0].x.device

    def whole(first_depends: bool) -> None:
        for launches in work:
            launch.start(launches, device, first_depends)

    whole(False)
    error = max(bench_moe.errors(outs[i], wanted[i])[0] for i in range(2))
    row: dict[str, Any] = {"shape": shape.name, "m": tokens, "path": path, "error": error}
    row |= {"dynamic": dynamic, "tune": " ".join(options.tune), "rows": options.rows}
    row["received"] = round(sum(len(call.x) for call in calls) / count)
    if not error < 1e-2:
        return row
    row["layer_us"] = _median(lambda: whole(False), count)
    row["chained_us"] = _median(lambda: whole(True), count)
    for number, (part, _) in enumerate(work[0] if options.parts else []):
        together = path == "prefill"
        name = f"{'to ' if together else ''}{number}:{part.kernel.entry}"
        first = 0 if together else number
        row[name] = _median(
            lambda f=first, n=number: [launch.start(item[f : n + 1], device) for item in work],
            count,
        )
    return row


_E4M3_PATHS = ("large", "prefill")


def _received(call: bench_moe.Call) -> bench_moe.Call:
    """Its tokens that have an expert here."""
    here = (call.topk_ids >= 0).any(dim=-1)
    return bench_moe.Call(call.x[here], call.topk_weights[here], call.topk_ids[here])


def _median(body: Any, count: int) -> float:
    return bench_moe.spread(bench_moe.graph_times_us(body, count, 7))[0]


_kept: dict[tuple[bench_moe.Shape, ActivationScheme, int], tuple[Any, Any]] = {}


def _weights(shape: bench_moe.Shape, scheme: ActivationScheme, seed: int) -> tuple[Any, Any]:
    key = (shape, scheme, seed)
    if key not in _kept:
        for old in [k for k in _kept if k[:2] != key[:2]]:
            del _kept[old]
        loaded = bench_moe.random_weights(shape, scheme, seed)
        ready = bench_moe.private_copy(loaded)
        shuffle_in_place(ready.w13, ready.w13_scale, True, False)
        shuffle_in_place(ready.w2, ready.w2_scale, False, False)
        _kept[key] = (loaded, ready.replaced(state=launch.new_counters(ready.w13.device)))
    return _kept[key]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["r1-tp8", "r1-tp16", "r1-tp32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    paths = ["small", "medium", "large", "prefill"]
    parser.add_argument("--path", nargs="+", choices=paths, default=paths[:3])
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=["all", "received", "e4m3"], default=["all"])
    parser.add_argument("--tune", nargs="*", default=[], help="see _tuned")
    parser.add_argument("--parts", action="store_true", help="time each launch alone, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="of this package; asked from git by default")
    options = parser.parse_args()
    wishes = itertools.product(options.shape, options.tokens, options.rows, options.path)
    rows = []
    for name, tokens, kind, path in wishes:
        if path == "small" and tokens > 16:
            continue
        options.rows = kind
        row = _measure(bench_moe.SHAPES[name], tokens, path, options)
        rows.append(row)
        print(
            " ".join(
                f"{k}={v:.3g}"
                if k == "error"
                else f"{k}={v:.1f}"
                if isinstance(v, float)
                else f"{k}={v}"
                for k, v in row.items()
            ),
            flush=True,
        )
        if options.json:
            text = {**environment(options.commit), "rows": rows}
            options.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
