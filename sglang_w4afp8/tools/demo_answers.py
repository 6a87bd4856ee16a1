"""What the demo's servers answered, and how that compares with transformers and with each other."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = [[5, 17, 99, 4, 211, 37], [301, 8, 8, 45], list(range(20, 60))]
NEW_TOKENS = 12
CPU_TOLERANCE = 1e-4
"""Largest accepted logprob difference in float32; the ranks add in another order, no more."""
GPU_TOLERANCE = 3.0
"""How far two backends may be apart on average, in units of what BF16 does to transformers."""


@dataclass
class Served:
    """One server's answers.

    Attributes:
        tp: tensor-parallel degree.
        backend: the expert kernel asked for.
        ready_s: seconds from start to the first healthy answer.
        token_ids: per prompt, the greedy continuation.
        logprobs: of those tokens.
        forced: per prompt, the logprob of each token of the judge's text after the ones before it.
        text: an OpenAI-style completion of ``demo.TEXT``.
        streamed: the same, received as a stream and put together.
    """

    tp: int
    backend: str
    ready_s: float
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    forced: list[list[float]]
    text: str
    streamed: str


@dataclass
class Story:
    """What the demo found, for ``--json``."""

    device: str
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    served: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    against_transformers: dict[str, dict[str, Any]] = field(default_factory=dict)
    among_servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    bf16_rounding: dict[str, float] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def say(line: str) -> None:
    """One progress line."""
    print(line, flush=True)


class Judge:
    """What transformers makes of a checkpoint's dequantised weights.

    Attributes:
        token_ids: per prompt, its greedy continuation.
        logprobs: of those tokens.
        texts: prompt and continuation in one.
        forced: the logprob of each token of ``texts`` but the first.
        rounding: how far ``forced`` moves on average when transformers computes in BF16, which is
            what BF16 servers are read against; None unless asked for.
        seconds: what that took.
    """

    def __init__(self, checkpoint: Path, *, coarse: bool = False) -> None:
        import torch

        from sglang_w4afp8.testing.hf_judge import HfJudge

        started = time.monotonic()
        model = HfJudge(checkpoint)
        found = [model.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
        self.token_ids = [continuation.token_ids for continuation in found]
        self.logprobs = [continuation.logprobs for continuation in found]
        self.texts = [prompt + ids for prompt, ids in zip(PROMPTS, self.token_ids, strict=True)]
        self.forced = [model.forced(text) for text in self.texts]
        self.rounding: float | None = None
        if coarse:
            other = HfJudge(checkpoint, torch.bfloat16)
            self.rounding = _mean_distance([other.forced(text) for text in self.texts], self.forced)
        self.seconds = time.monotonic() - started


def compare(name: str, judge: Judge, results: list[Served], story: Story, *, on_gpu: bool) -> None:
    """Tokens and logprobs of the servers against transformers and against the first of them."""
    if judge.rounding is not None:
        story.bf16_rounding[name] = judge.rounding
        say(f"      {name}: BF16 alone moves transformers by {judge.rounding:.1e} on average")
    first = results[0]
    for result in results:
        if result.text != result.streamed:
            story.problems.append(f"{name}: {title(result)}: plain and streamed texts differ")
        found = _difference(result, judge.token_ids, judge.logprobs, judge.forced)
        story.against_transformers[f"{name}: {title(result)}"] = found
        _judge(f"{name}: {title(result)} against transformers", found, story, on_gpu)
        if result is not first:
            found = _difference(result, first.token_ids, first.logprobs, first.forced)
            key = f"{name}: {title(result)} against {title(first)}"
            story.among_servers[key] = found
            _judge(key, found, story, on_gpu)
            if judge.rounding is not None:
                times = found["mean_forced_logprob_difference"] / judge.rounding
                if times > GPU_TOLERANCE:
                    story.problems.append(f"{key}: {times:.1f} times BF16's own rounding")


def _difference(
    result: Served, ids: list[list[int]], logprobs: list[list[float]], forced: list[list[float]]
) -> dict[str, Any]:
    same = result.token_ids == ids
    return {
        "tokens_identical": same,
        # Once a token differs, what follows answers another question.
        "largest_logprob_difference": (
            max(_absolute_differences(result.logprobs, logprobs)) if same else None
        ),
        "mean_forced_logprob_difference": _mean_distance(result.forced, forced),
    }


def _judge(key: str, found: dict[str, Any], story: Story, on_gpu: bool) -> None:
    tokens = "identical" if found["tokens_identical"] else "DIFFERENT"
    largest = found["largest_logprob_difference"]
    line = f"{key}: tokens {tokens}"
    if largest is not None:
        line += f", largest logprob difference {largest:.1e}"
    mean = found["mean_forced_logprob_difference"]
    say(f"      {line}; over a given text {mean:.1e} on average")
    # On a GPU activations are FP8 and sums BF16: tokens may differ, and where they do is shown.
    if not on_gpu and (largest is None or largest > CPU_TOLERANCE):
        story.problems.append(f"{line} > {CPU_TOLERANCE:.0e}")


def title(served: Served) -> str:
    """How a server is called in the report."""
    return f"tp {served.tp}" + (f" {served.backend}" if served.backend != "auto" else "")


def _absolute_differences(one: list[list[float]], other: list[list[float]]) -> list[float]:
    pairs = (zip(a, b, strict=True) for a, b in zip(one, other, strict=True))
    return [abs(a - b) for prompt in pairs for a, b in prompt]


def _mean_distance(one: list[list[float]], other: list[list[float]]) -> float:
    apart = _absolute_differences(one, other)
    return sum(apart) / len(apart)
