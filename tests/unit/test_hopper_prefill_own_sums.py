"""Sums in FP16 of down whose CTAs own outputs: they stay finite, and exact enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hopper_own import JOBS
from kernel_source import c_find, c_value

FP8_MAX, BITS = 448.0, 126  # kFp8Max; 2^(e - BITS) is above a float whose exponent's bits are e
LARGEST_FINITE = 241  # of e: beyond it, bounds above 2^115, sums may be infinite in FP16


def exponent_of(bound: float, sizes: list[float], b_scales: list[float] | None = None) -> int:
    """``describe_sums`` of one token, in FP32. ``b_scales``: of pairs, None if there is one."""
    total = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for k, size in enumerate(sizes):
            if size > 0:
                scale = b_scales[k] if b_scales else 1
                total += np.float32(size) * np.float32(scale)
        product = np.float32(total * np.float32(bound))
    e = int(product.view(np.uint32)) >> 23 & 255
    text = c_find(JOBS, ("void describe_sums",), "exponent")
    exponent: int = eval(text, {"min": min, "max": max, "e": e})
    return exponent


def scaling(exponent: int) -> float:
    """``scaling``."""
    bits = c_value(c_find(JOBS, ("float scaling(",), "return"), {
        "exponent": exponent, "__uint_as_float": int,
    })  # fmt: skip
    return float(np.uint32(bits).view(np.float32))


def scaling_back(exponent: int) -> float:
    """``scaling_back``."""
    text = c_find(JOBS, ("float scaling_back(",), "return")
    return float(c_value(text, {"exponent": exponent, "scaling": scaling}))


def bound_of(largest: float, k: int) -> float:
    """Of a result before its weight, as ``describe_jobs`` has it."""
    text = c_find(JOBS, ("void describe_jobs",), "bound").replace("8.0f", "8.0")
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.float32(eval(text, {"largest": largest, "kFp8Max": FP8_MAX, "kK": k})))


def test_e_is_what_is_named_in_the_source() -> None:
    text = " ".join(c_find(JOBS, ("void describe_sums",), "e").split())
    assert text == "static_cast<int>(__float_as_uint(sum * bound * b_scale) >> 23 & 255)"
    assert "if (size > 0.0f) sum +=" in JOBS_TEXT and "bits < 0x7f800000u" in ROUTE_TEXT


def _text(name: str) -> str:
    from sglang_w4afp8.kernels.hopper.build import CSRC

    return (CSRC / name).read_text()


JOBS_TEXT, ROUTE_TEXT = _text(JOBS), _text("prefill_route.cu")
SMALLEST, HUGE = 2.0**-149, 3e38
SPECIAL = [0.0, SMALLEST, 1e-38, 1e-30, 1e-8, 0.1, 1.0, 7.0, 1e10, 1e30, HUGE, np.inf, np.nan]


def check(exponent: int, largest_sum: float) -> None:
    """``largest_sum``: no sum is above it."""
    forth, back = scaling(exponent), scaling_back(exponent)
    tiny = float(np.finfo(np.float32).tiny)
    assert forth * back == 1.0 and tiny <= forth < np.inf and tiny <= back < np.inf
    assert np.frexp(forth)[0] == np.frexp(back)[0] == 0.5, "a power of two"
    if largest_sum < 2.0 ** (LARGEST_FINITE - BITS):
        assert largest_sum * forth <= 2.0**15
    if 2.0**-80 < largest_sum < 2.0**110:
        assert largest_sum * forth > 2.0**13, "FP16's range is not used"


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_stay_below_what_fp16_holds(dynamic: bool) -> None:
    rng = np.random.default_rng(dynamic)
    for trial in range(3000):
        top_k, k = int(rng.integers(1, 17)), int(rng.choice([64, 128, 192, 256]))
        sizes = np.exp2(rng.uniform(-40, 40) + rng.normal(0, 4, top_k)).tolist()
        largest = float(np.exp2(rng.uniform(-60, 60)))
        scales = np.exp2(rng.uniform(-40, 10, top_k)).tolist()
        if trial % 3 == 0:
            for i in range(top_k):
                sizes[i] = float(rng.choice(SPECIAL)) if rng.random() < 0.5 else sizes[i]
        if trial % 5 == 0:
            largest = float(rng.choice(SPECIAL[:-2]))  # the largest finite one
        bound = bound_of(largest, k)
        exponent = exponent_of(bound, sizes, scales if dynamic else None)
        terms = [
            s * (b if dynamic else 1) for s, b in zip(sizes, scales, strict=True) if np.isfinite(s)
        ]
        finite = all(map(np.isfinite, sizes))
        exact = sum(terms) * largest * FP8_MAX * 8 * k
        # Between what FP32 holds at both ends
        finite = finite and bound < np.inf and sum(terms) < 1e38 and exact > 1e-35
        check(exponent, exact if finite else np.inf)


@pytest.mark.parametrize("size", SPECIAL)
@pytest.mark.parametrize("largest", SPECIAL[:-2])
def test_whatever_comes_has_a_scaling(size: float, largest: float) -> None:
    exponent = exponent_of(bound_of(largest, 256), [size])
    assert 27 <= exponent <= 227
    check(exponent, np.inf)


def one_token(rng: Any, k: int, rows: int, experts: int, uneven: float) -> tuple[Any, ...]:
    codes = rng.integers(-8, 8, (experts, rows, k)).astype(np.float64)
    scales = rng.uniform(0.5, 1.5, (experts, rows, 1)) * 0.01
    scales[0] *= uneven
    q = np.clip(np.round(rng.normal(0, 60, (experts, k)) / 4) * 4, -FP8_MAX, FP8_MAX)
    weights = rng.dirichlet(np.ones(experts))
    return codes * scales, q, weights, float(scales.max())


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("uneven", [1.0, 1000.0])
@pytest.mark.parametrize("k", [64, 256])
def test_fp16_sums_are_nearly_as_exact_as_what_they_are_of(
    k: int, uneven: float, hidden: bool
) -> None:
    """8 experts. ``hidden``: the one with the largest scales is not among the token's."""
    rng, b_scale = np.random.default_rng(k), 0.02
    wrong = wanted_norm = 0.0
    for _ in range(20):
        w2, q, weights, largest = one_token(rng, k, 512, 9, uneven)
        chosen = slice(1, 9) if hidden else slice(0, 8)
        w2, q, weights = w2[chosen], q[chosen], weights[chosen]
        bound = bound_of(largest, k) * b_scale
        exponent = exponent_of(bound, weights.tolist())
        wanted = np.einsum("erk,ek,e->r", w2, q, weights) * b_scale
        total = np.zeros(w2.shape[1], np.float16)
        for e in range(8):
            result = (w2[e] @ q[e]).astype(np.float32)
            by = np.float32(weights[e] * b_scale) * np.float32(scaling(exponent))
            total = total + (result * by).astype(np.float16)
        assert np.isfinite(total).all()
        out = total.astype(np.float64) * scaling_back(exponent)
        wrong += float(((out - wanted) ** 2).sum())
        wanted_norm += float((wanted**2).sum())
    assert (wrong / wanted_norm) ** 0.5 < 1e-3
