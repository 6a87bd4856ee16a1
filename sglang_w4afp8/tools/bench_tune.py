"""``sglang-w4afp8 bench tune``: from how many tokens on which Hopper path is fastest on this card.

Every path is compared with the float64 oracle before its time counts. The result goes into the
user's table (:mod:`sglang_w4afp8.kernels.hopper.tables`), which servers read when they load.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from sglang_w4afp8 import __version__
from sglang_w4afp8.errors import BackendError, ConfigError
from sglang_w4afp8.kernels.hopper import launch, tables
from sglang_w4afp8.kernels.hopper.backend import HopperBackend, layer_of
from sglang_w4afp8.kernels.hopper.plan import PATHS, Layer, plan
from sglang_w4afp8.layer import Device
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.bench_check import expected
from sglang_w4afp8.tools.bench_choose import ROUNDS, Times, first_numbers, search
from sglang_w4afp8.tools.bench_environment import command, environment
from sglang_w4afp8.tools.bench_moe import (
    SHAPES,
    Call,
    Shape,
    call_count,
    errors,
    graph_times_us,
    oracle,
    private_copy,
    random_calls,
    random_weights,
    shape_argument,
    spread,
)
from sglang_w4afp8.tools.bench_peers import Ours
from sglang_w4afp8.tools.console import Progress, print_json
from sglang_w4afp8.tools.plan_source import find_model

CHECKED_TOKENS = 64
"""Tokens of a call that are compared; which path is right is the tests' business."""


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape", nargs="+", type=shape_argument,
        help=f"{', '.join(SHAPES)}, or experts=256,hidden=7168,inner=256,top_k=8",
    )  # fmt: skip
    what.add_argument("--model", help="checkpoint folder, config.json, or a name like DeepSeek-R1")
    parser.add_argument("--tp", type=int, default=8, help="of --model (default 8)")
    parser.add_argument("--ep", type=int, default=1, help="of --model (default 1)")
    parser.add_argument(
        "--scheme", choices=("static", "dynamic_per_token"),
        help="activation scales (default: the model's, static with --shape)",
    )  # fmt: skip
    parser.add_argument(
        "--codes", type=int, choices=(15, 16), default=15,
        help="as in bench moe: 16 for checkpoints that hold a −8 (default 15)",
    )  # fmt: skip
    parser.add_argument(
        "--most-tokens", type=int, default=8192,
        help="largest call to measure, the server's --chunked-prefill-size (default 8192)",
    )  # fmt: skip
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--table", type=Path, help="write here, not into the cache folder")
    parser.add_argument("--json", action="store_true", help="print times and limits as JSON")
    parser.add_argument("--commit", help="of this package, for --json; asked from git by default")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be measured and written; no GPU"
    )


def run_tune(options: argparse.Namespace) -> int:
    """Measure each shape and write its limits.

    Raises:
        ConfigError: the model or its layout is none, or ``--most-tokens`` is not positive.
        ShardError: the model cannot be cut that way.
        BackendError: this card or shape is not one that the Hopper kernels run, or a path's
            results are wrong.
    """
    if options.most_tokens < 1:
        raise ConfigError(
            f"--most-tokens {options.most_tokens}", "it must be positive", ["--most-tokens 8192"]
        )
    shapes, scheme = _wanted(options)
    if options.dry_run:
        for shape in shapes:
            print(_dry(shape, scheme, options))
        return 0
    if not torch.cuda.is_available():
        raise BackendError(
            "bench tune: no CUDA device is visible to torch",
            "times of this card are what it measures",
            ["--dry-run shows what would be measured"],
        )
    told = []
    for shape in shapes:
        told.append(_tune(shape, scheme, options))
    if options.json:
        print_json(told)
    return 0


def _wanted(options: argparse.Namespace) -> tuple[list[Shape], ActivationScheme]:
    if options.shape:
        return options.shape, ActivationScheme(options.scheme or "static")
    model = find_model(options.model)
    model.check(options.tp, options.ep)
    ranks = options.tp // options.ep
    cut = AxisShard.even(model.expert_width, model.spec.group_size, 0, ranks, "experts' width")
    shape = Shape(
        f"{model.name}-tp{options.tp}" + (f"-ep{options.ep}" if options.ep > 1 else ""),
        model.experts // options.ep,
        model.experts,
        model.hidden,
        cut.size,
        model.expert_width,
        model.top_k,
        model.spec.group_size,
    )
    return [shape], ActivationScheme(options.scheme or model.spec.moe_activation)


def _dry(shape: Shape, scheme: ActivationScheme, options: argparse.Namespace) -> str:
    if torch.cuda.is_available():
        path = options.table or tables.user_path(torch.cuda.get_device_name())
    else:
        path = options.table or tables.user_path("CARD")
    numbers = first_numbers(options.most_tokens)
    return (
        f"{shape.name}: {shape.experts} of {shape.all_experts} experts, {shape.hidden} x "
        f"{shape.inner}, top {shape.top_k}, {scheme}, {options.codes} codes\n"
        f"  paths {', '.join(PATHS)}, each where it can run the call\n"
        f"  {', '.join(map(str, numbers))} tokens, then up to {ROUNDS} numbers more around each "
        f"change of path\n"
        f"  would write {path}"
    )


class Bench:
    """Times of one layer's paths on the current card.

    Args:
        shape: of the layer.
        scheme: of its activations.
        codes: 15 or 16.
        replays: timed ones.

    Raises:
        BackendError: the Hopper kernels do not run it.
    """

    def __init__(self, shape: Shape, scheme: ActivationScheme, codes: int, replays: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        problem = shape.problem(scheme, device)
        backend = HopperBackend()
        reason = backend.supports(problem)
        if reason is not None:
            raise BackendError(
                f"bench tune {shape.name}", reason, ["tune a shape and card that hopper runs"]
            )
        self.device_name = Device.of(device).name
        self._shape, self._scheme, self._replays = shape, scheme, replays
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._loaded = [random_weights(shape, scheme, seed, codes) for seed in range(2)]
        self._ready = [backend.prepare(problem, private_copy(w)) for w in self._loaded]
        first = self._ready[0]
        self.layer: Layer = layer_of(
            first.w13, first.w2, first.w13_scale, first.w2_scale, shape.top_k,
            first.w13.dtype is torch.uint8, scheme is not ActivationScheme.STATIC,
        )  # fmt: skip
        self._inputs: tuple[int, list[Call]] = (0, [])

    def __call__(self, path: str, tokens: int) -> float | None:
        """Median microseconds, or None where ``path`` cannot run the call.

        Raises:
            BackendError: its output is wrong.
        """
        if path != "prefill" and plan(self.layer, tokens, self._sms, path).path != path:
            return None
        if self._inputs[0] != tokens:
            count = call_count(self._shape, tokens)
            made = random_calls(self._shape, tokens, "uniform", count, seed=tokens)
            self._inputs = tokens, made
            self._wanted = expected(
                lambda part: oracle(self._loaded[0], part, self._scheme),
                made[0],
                0.0,
                CHECKED_TOKENS,
            )
        calls = self._inputs[1]
        found, _ = errors(self._wanted.of(self._run(path, 0, calls[0])), self._wanted.output)
        if not found < Ours.tolerance:
            raise BackendError(
                f"path {path}, {tokens} tokens of {self._shape.name}: error {found:.1e}",
                f"{Ours.tolerance:.0e} is allowed; a path that is wrong here must not be chosen",
                ["rm -r ~/.cache/sglang-w4afp8/kernels, and again", "report it with this line"],
            )

        def body() -> list[torch.Tensor]:
            return [self._run(path, number % 2, call) for number, call in enumerate(calls)]

        us, _ = spread(graph_times_us(body, len(calls), self._replays))
        return us

    def _run(self, path: str, number: int, call: Call) -> torch.Tensor:
        weights = self._ready[number]
        filled = self.layer.hidden - call.x.shape[1]
        tensors = launch.Tensors(
            torch.nn.functional.pad(call.x, (0, filled)) if filled else call.x,
            call.topk_weights,
            call.topk_ids,
            weights.w13,
            weights.w13_scale,
            weights.w2,
            weights.w2_scale,
            weights.w13_input_scale,
            weights.w2_input_scale,
            weights.state.counters,
        )
        return launch.run(self.layer, tensors, 1.0, path)[:, : call.x.shape[1]]


def _tune(shape: Shape, scheme: ActivationScheme, options: argparse.Namespace) -> dict[str, object]:
    begin = time.monotonic()
    bench = Bench(shape, scheme, options.codes, options.replays)
    bar = Progress(1, f"tune {shape.name}", show=lambda count: f"{count:.0f} timings")

    def told(done: int, total: int) -> None:
        bar.expect(total)
        bar.update(done)

    times, limits = search(bench, options.most_tokens, told)
    bar.finish()
    path = options.table or tables.user_path(bench.device_name)
    origin = f"bench tune, {time.strftime('%Y-%m-%d')}, sglang-w4afp8 {__version__}"
    moved = tables.save(path, bench.layer, limits, bench.device_name, origin)
    if not options.json:
        print(f"{shape.name}: {tables.sizes(bench.layer)}; {tables.variant(bench.layer)}")
        print(as_text(times))
        print(f"{tables.words(limits)}; {time.monotonic() - begin:.0f} s")
        print(f"written: {path}")
        if moved is not None:
            print(f"what stood there was no table of this card and version: now {moved}")
    return {
        **environment(options.commit),
        "command": command(sys.argv[1:]),
        "shape": shape.name,
        "sizes": tables.sizes(bench.layer),
        "variant": tables.variant(bench.layer),
        "us": times,
        "limits": limits._asdict(),
        "table": str(path),
    }


def as_text(times: Times) -> str:
    """Microseconds, tokens down, paths across; the fastest with a star."""
    lines = [f"{'tokens':>8}" + "".join(f"{path:>12}" for path in PATHS)]
    for m in sorted({m for measured in times.values() for m in measured}):
        row = {path: times[path][m] for path in PATHS if m in times[path]}
        best = min(row.values())
        cells = [
            f"{row[path]:.1f}{'*' if row[path] == best else ' '}" if path in row else "- "
            for path in PATHS
        ]
        lines.append(f"{m:>8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
