"""Checks and times one provider after the other on the same inputs, for ``bench moe``.

Whatever a peer does wrong, short of breaking the CUDA context, becomes a row with its reason.
"""

from __future__ import annotations

import argparse
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.bench_check import Expected, expected
from sglang_w4afp8.tools.bench_moe import (
    Call,
    Ceilings,
    Shape,
    call_count,
    errors,
    graph_times_us,
    hit_experts,
    oracle,
    random_calls,
    random_weights,
    spread,
)
from sglang_w4afp8.tools.bench_peers import Ours, Provider, Run

Row = dict[str, Any]


class ContextLost(Exception):
    """The CUDA context does not work any more; nothing further can run in this process."""


class Measurement:
    """One shape's weights, inputs and expected outputs, shared by all providers.

    Args:
        options: of ``bench moe``.
        ceilings: of the card.
    """

    def __init__(self, options: argparse.Namespace, ceilings: Ceilings) -> None:
        self._options = options
        self._ceilings = ceilings
        self._scheme = ActivationScheme(options.scheme)

    def load(self, shape: Shape) -> None:
        """Make the weights of ``shape``; forget another's."""
        self._shape = shape
        self._problem = shape.problem(self._scheme, torch.device("cuda"))
        count = self._options.weight_sets
        codes = self._options.codes
        self._sets = [random_weights(shape, self._scheme, seed, codes) for seed in range(count)]
        self._calls: dict[tuple[str, int], list[Call]] = {}
        self._wanted: dict[tuple[str, int, int, ActivationScheme], Expected] = {}
        self._ours_us: dict[tuple[str, int], float] = {}

    def provider(self, provider: Provider, rows: list[Row]) -> None:
        """Append the rows of ``provider``, one for each routing and M, or one with a reason.

        Raises:
            ContextLost: the provider broke the CUDA context; its rows so far are appended.
        """
        shape, name = self._shape, provider.name
        named = {"shape": shape.name, "provider": name}
        try:
            with _time_limit(None if name == "ours" else self._options.peer_limit):
                reason = provider.why_not(self._problem)
                if reason is not None:
                    rows.append(named | {"reason": reason})
                    return
                most = max(self._options.tokens)
                runs = [
                    provider.prepare(self._problem, weights, shape.all_experts, most)
                    for weights in self._sets
                ]
                self._kept_bytes = 0
                for routing in self._options.routing:
                    for tokens in self._options.tokens:
                        rows.append(named | {"m": tokens, "routing": routing})
                        self._one_or_reason(provider, runs, rows[-1])
        except ContextLost:
            raise
        except Exception as error:  # a peer may fail in any way
            if rows and rows[-1].keys() == {*named, "m", "routing"}:
                rows[-1]["reason"] = _reason(error)
            else:
                rows.append(named | {"reason": _reason(error)})
            _check_context()
        finally:
            runs = []
            gc.collect()
            _check_context()
            torch.cuda.empty_cache()

    def _one_or_reason(self, provider: Provider, runs: list[Run], row: Row) -> None:
        """One number of tokens; what it raises, out of memory above all, ends this row only."""
        try:
            self._one(provider, runs, row)
        except TimeoutError:
            raise
        except Exception as error:
            row["reason"] = _reason(error)
        if "reason" in row:
            gc.collect()  # what a traceback or a half-captured graph held
            _check_context()
            torch.cuda.empty_cache()

    def _inputs(self, routing: str, tokens: int) -> list[Call]:
        key = (routing, tokens)
        if key not in self._calls:
            count = call_count(self._shape, tokens)
            self._calls[key] = random_calls(self._shape, tokens, routing, count, seed=tokens)
        return self._calls[key]

    def _expected(
        self, routing: str, tokens: int, number: int, scheme: ActivationScheme
    ) -> Expected:
        key = (routing, tokens, number, scheme)
        if key not in self._wanted:
            weights = self._sets[number]
            self._wanted[key] = expected(
                lambda part: oracle(weights, part, scheme),
                self._inputs(routing, tokens)[number],
                self._options.check_seconds,
            )
        return self._wanted[key]

    def _one(self, provider: Provider, runs: list[Run], row: Row) -> None:
        routing, tokens = row["routing"], row["m"]
        calls = self._inputs(routing, tokens)
        scheme = provider.judged_by(self._scheme)
        worst, largest, checked = 0.0, 0.0, tokens
        for number, run in enumerate(runs):
            call = calls[number]
            before = torch.cuda.memory_allocated()
            out = run(call.x, call.topk_weights, call.topk_ids)
            if number == 0:
                grown = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
                self._kept_bytes += max(0, grown)
            wanted = self._expected(routing, tokens, number, scheme)
            checked = min(checked, wanted.output.shape[0])
            found = errors(wanted.of(out), wanted.output)
            del out
            # Written so that NaN is kept.
            worst = found[0] if not found[0] <= worst else worst
            largest = found[1] if not found[1] <= largest else largest
        row |= {
            "error": worst,
            "max_error": largest,
            "checked_tokens": checked,
            "oracle": str(scheme),
            "tolerance": provider.tolerance,
            "wrong": not worst < provider.tolerance,
        }
        if isinstance(provider, Ours):
            row["path"] = provider.path(tokens)
        if row["wrong"] or self._options.check_only:
            return
        row["extra_mb"] = (self._kept_bytes + _extra_bytes(runs[0], calls[0])) / 1e6

        def body() -> list[torch.Tensor]:
            return [
                runs[i % len(runs)](call.x, call.topk_weights, call.topk_ids)
                for i, call in enumerate(calls)
            ]

        count = len(calls)
        us, spread_us = spread(graph_times_us(body, count, self._options.replays))
        row |= self._figures(calls, us, spread_us)
        if provider.name == "ours":
            self._ours_us[routing, tokens] = us
        elif (routing, tokens) in self._ours_us:
            row["times_ours"] = us / self._ours_us[routing, tokens]
        print(line(row), flush=True)

    def _figures(self, calls: list[Call], us: float, spread_us: float) -> Row:
        """The same bytes and operations for everyone: those of the INT4 layer."""
        shape = self._shape
        weight_bytes = hit_experts(calls) * shape.expert_bytes
        pairs = sum(int((call.topk_ids >= 0).sum()) for call in calls) / len(calls)
        flops = pairs * 6 * shape.inner * shape.hidden
        return {
            "us": us,
            "spread_us": spread_us,
            "calls": len(calls),
            "weight_bytes": weight_bytes,
            "gb_s": weight_bytes / us / 1e3,
            "tflops": flops / us / 1e6,
            "roofline_us": self._ceilings.roofline_us(weight_bytes, flops),
        }


def _extra_bytes(run: Run, call: Call) -> int:
    """The most memory that one call has beside its inputs, weights and output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(call.x, call.topk_weights, call.topk_ids)
    torch.cuda.synchronize()
    # A peer's output may be the front of its workspace: only the output itself does not count.
    return max(0, torch.cuda.max_memory_allocated() - before - out.nbytes)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def line(row: Row) -> str:
    """A row for the terminal."""
    start = f"{row['shape']:14} {row['provider']:18} "
    if "m" in row:
        start += f"{row['routing']:8} M={row['m']:<6}"
    if "reason" in row:
        return f"{start}not run: {row['reason']}"
    accuracy = f"error {row['error']:.1e} (largest {row['max_error']:.1e})"
    if "us" not in row:
        verdict = "WRONG, not timed" if row["wrong"] else "right"
        return f"{start}{verdict}: {accuracy}, allowed {row['tolerance']:.1e}"
    ratio = f" ×{row['times_ours']:.2f} of ours" if "times_ours" in row else ""
    return (
        f"{start}{row['us']:9.1f} us ±{row['spread_us']:5.1f} {row['gb_s']:7.0f} GB/s "
        f"{row['tflops']:7.1f} TFLOPS {100 * row['roofline_us'] / row['us']:5.0f} % of roofline "
        f"{accuracy} extra {row['extra_mb']:.0f} MB{ratio}"
    )


def _check_context() -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise ContextLost(" ".join(str(error).split())[:200]) from error


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``; a build's child processes may go on."""
    if not seconds:
        yield
        return

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s, building its kernels included")

    old: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
