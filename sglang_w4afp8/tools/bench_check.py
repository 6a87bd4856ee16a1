"""What a layer ought to give, in float64, for as many tokens of a large call as time allows.

A call of 16 384 tokens is 131 072 (token, expert) pairs and 0.9 GB a float64 copy of its output. So
the oracle works in strided parts of at most :data:`PART_TOKENS` tokens and stops, after at least
one, when its time is over: what is compared is then tokens t with t mod parts < parts done, which
depends on nothing but the count that a row states.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_w4afp8.tools.bench_moe import Call

PART_TOKENS = 2048


class Expected(NamedTuple):
    """Outputs of some tokens of a call.

    Attributes:
        tokens: ``(T,)`` int64, which; None for all of them in order.
        output: ``(T, hidden)`` float32: as float64 made them, kept in half the memory.
    """

    tokens: torch.Tensor | None
    output: torch.Tensor

    def of(self, out: torch.Tensor) -> torch.Tensor:
        """Those rows of a call's ``(M, hidden)`` output that can be compared."""
        return out if self.tokens is None else out[self.tokens]


def expected(
    oracle: Callable[[Call], torch.Tensor], call: Call, seconds: float, part: int = PART_TOKENS
) -> Expected:
    """The oracle's output for a call.

    Args:
        oracle: of a call, float64. Tokens must not depend on each other, which leaves out dynamic
            per-tensor scales.
        call: M tokens.
        seconds: no further part is begun after so many; 0 makes one part of a large call.
        part: most tokens of one part.
    """
    total = call.x.shape[0]
    parts = max(1, -(-total // part))
    tokens, outputs = [], []
    begin = time.monotonic()
    for first in range(parts):
        chosen = torch.arange(first, total, parts, device=call.x.device)
        tokens.append(chosen)
        picked = Call(call.x[chosen], call.topk_weights[chosen], call.topk_ids[chosen])
        outputs.append(oracle(picked).to(torch.float32))
        float(outputs[-1].sum())  # waits for the GPU, so that the clock is about work done
        if time.monotonic() - begin > seconds:
            break
    if parts == 1:
        return Expected(None, outputs[0])
    return Expected(torch.cat(tokens), torch.cat(outputs))
