"""FP16 of down whose CTAs own outputs: results, weights and sums stay finite, and exact enough."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hopper_own import FEED, JOBS, KERNEL
from kernel_source import c_find, c_value

from sglang_w4afp8.kernels.hopper.build import CSRC

FP8_MAX, BITS = 448.0, 126  # kFp8Max; 2^(e - BITS) is above a float whose exponent's bits are e
LARGEST_FINITE = 241  # of e: beyond it, bounds above 2^115, sums may be infinite in FP16
CODE = 2.0**-9  # what codes are decoded to
SMALLEST, HUGE = 2.0**-149, 3e38
SPECIAL = [0.0, SMALLEST, 1e-38, 1e-30, 1e-8, 0.1, 1.0, 7.0, 1e10, 1e30, HUGE, np.inf, np.nan]


def in_fp32(source: str, within: tuple[str, ...], name: str, scope: dict[str, Any]) -> np.float32:
    """An expression of the kernel without a division; ``scope`` has FP32 values."""
    text = re.sub(r"(\d\.\d+)f\b", r"\1", c_find(source, within, name))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.float32(c_value(text, scope))


def exponent_for(bound: float | np.float32) -> int:
    """``exponent_for``."""
    scope: dict[str, Any] = {"bound": np.float32(bound)}
    scope["__float_as_uint"] = lambda value: int(value.view(np.uint32))
    within = ("u32 exponent_for(",)
    scope["e"] = c_value(c_find(JOBS, within, "e"), scope)
    exponent: int = c_value(c_find(JOBS, within, "return"), scope)
    return exponent


def exponent_of(
    bound: float, sizes: list[float], b_scales: list[float] | None = None, b_scale: float = 1.0
) -> int:
    """``describe_sums`` of one token, in FP32. ``b_scales``: of pairs, None if there is one."""
    total = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for k, size in enumerate(sizes):
            if size > 0:
                scale = b_scales[k] if b_scales else 1
                total += np.float32(size) * np.float32(scale)
    scope = {"sum": total, "bound": np.float32(bound), "b_scale": np.float32(b_scale)}
    return exponent_for(in_fp32(JOBS, ("void describe_sums",), "exponent_for(", scope))


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


def told(largest: float) -> np.float32:
    """What ``find_largest`` says of scales."""
    text = c_find("prefill_route.cu", ("void find_largest(",), "largest")
    least = np.uint32(int(text.removesuffix("u"), 16)).view(np.float32)
    return np.float32(max(np.float32(largest), least))


def bound_of(largest: float, k: int) -> float:
    """Of a result before its weight, as ``describe_jobs`` has it."""
    scope = {"largest": told(largest), "kFp8Max": FP8_MAX, "kK": k}
    return float(in_fp32(JOBS, ("void describe_jobs",), "bound", scope))


def unit_of(bound: float) -> float:
    """What results are multiplied by, as ``describe_jobs`` has it."""
    scope = {"bound": bound, "exponent_for": exponent_for, "scaling": scaling}
    return float(in_fp32(JOBS, ("void describe_jobs",), "unit", scope))


def halves(values: Any) -> Any:
    """To FP16, rounded once."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16)


def weight_of(
    weight: float, exponent: int, unit: float, b_scale: float, b_scales: list[float] | None = None
) -> np.float16:
    """``produce_tokens``: a column's weight, in FP32 and then FP16."""
    scope: dict[str, Any] = {"job": SimpleNamespace(unit=np.float32(unit))}
    scope["__frcp_rn"] = lambda value: np.float32(1) / value
    within = ("void produce_tokens", "job = *s.job(")
    scope["without_unit"] = in_fp32(FEED, within, "without_unit", scope)
    assert unit * float(scope["without_unit"]) == 1
    scope["column"] = SimpleNamespace(weight=np.float32(weight), pair=0)
    scope |= {"scale": [np.float32(b_scales[0] if b_scales else b_scale)], "i": 0, "t": 0}
    scope["now"], scope["load_exponent"] = SimpleNamespace(exponents=exponent), int
    scope["scaling"] = lambda exponent: np.float32(scaling(exponent))
    found = in_fp32(FEED, ("void produce_tokens", "__umulhi("), "weight", scope)
    half: np.float16 = halves(found)[()]
    return half


def results_of(codes: Any, scales: Any, q: Any, unit: float) -> Any:
    """``multiply``: results of rows, as ``add`` packs them to FP16.

    Args:
        codes: (rows, groups, K / groups).
        scales: (rows, groups), bfloat16.
        q: (groups, K / groups).
        unit: of the job.
    """
    job = SimpleNamespace(unit=np.float32(unit))
    by = in_fp32(KERNEL, ("void consume()",), "unit", {"job": job})
    scope = {"bf16_low": np.float32, "begin": 0, "unit": by}
    total = np.zeros(len(codes), np.float32)
    part = np.einsum("rgk,gk->rg", codes * CODE, q).astype(np.float32)
    for row, group in np.ndindex(scales.shape):
        here = scope | {"scales": scales[row], "i": group}
        s0 = in_fp32(KERNEL, ("void multiply(",), "s0", here)
        total[row] = np.float32(float(part[row, group]) * float(s0) + float(total[row]))
    return halves(total)


def added(result: Any, weight: np.float16, old: Any) -> Any:
    """``fma_halves``."""
    return halves(result.astype(np.float64) * np.float64(weight) + old.astype(np.float64))


def _text(name: str) -> str:
    return " ".join((CSRC / name).read_text().split())


def test_what_is_emulated_is_in_the_source() -> None:
    jobs, feed, kernel = (_text(name) for name in (JOBS, FEED, KERNEL))
    assert "if (size > 0.0f) sum +=" in jobs and "bits < 0x7f800000u" in _text("prefill_route.cu")
    assert '"r"(at), "r"(pack_half(weight, weight))' in feed
    assert "scale[i] = b_scale; if (kDynamic && lane + i * 32 < now.here) scale[i] = " in feed
    assert "scale[i] = __ldcg(p.b_scale + now.column[i].pair);" in feed
    assert "part[i][c] * by : v[c] + part[i][c] * by" in kernel
    assert kernel.count("sts32(at[c], fma_halves(more[c], by[c], ") == 2
    assert "fma.rn.f16x2 %0, %1, %2, %3" in _text("primitives.cuh")


# ---- ranges --------------------------------------------------------------------------------------
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
def test_results_and_sums_stay_below_what_fp16_holds(dynamic: bool) -> None:
    rng, finite_sums = np.random.default_rng(dynamic), 0
    for trial in range(3000):
        top_k, k = int(rng.integers(1, 17)), int(rng.choice([64, 128, 192, 256]))
        sizes = np.exp2(rng.uniform(-40, 40) + rng.normal(0, 4, top_k)).tolist()
        largest = float(np.exp2(rng.uniform(-60, 60)))
        scales = np.exp2(rng.uniform(-40, 10, top_k)).tolist()
        b_scale = 1.0 if dynamic else float(np.exp2(rng.uniform(-20, 5)))
        if trial % 3 == 0:
            for i in range(top_k):
                sizes[i] = float(rng.choice(SPECIAL)) if rng.random() < 0.5 else sizes[i]
        if trial % 5 == 0:
            largest = float(rng.choice(SPECIAL[:-2]))  # the largest finite one
        bound = bound_of(largest, k)
        of_pairs = scales if dynamic else None
        exponent, unit = exponent_of(bound, sizes, of_pairs, b_scale), unit_of(bound)
        terms = [
            s * (b if dynamic else b_scale)
            for s, b in zip(sizes, scales, strict=True)
            if np.isfinite(s)
        ]
        most = float(told(largest)) * FP8_MAX * 8 * k
        exact = sum(terms) * most
        check(exponent_for(bound), most)
        finite = all(map(np.isfinite, sizes)) and bound < np.inf
        # Between what FP32 holds at both ends, and on the way
        before = sum(terms if dynamic else sizes)
        finite = finite and before < 1e38 and before * bound < 1e38 and exact > 1e-35
        check(exponent, exact if finite else np.inf)
        if not finite or max(exact, most) >= 2.0**115:
            continue
        # The worst there can be
        finite_sums += 1
        result, total = halves(most * unit), np.float16(0)
        assert result <= 2**15
        for i, size in enumerate(sizes):
            weight = weight_of(
                size, exponent, unit, b_scale, scales[i : i + 1] if dynamic else None
            )
            assert 0 <= weight <= 2.01
            total = added(result, weight, np.asarray(total))
        assert total <= 2**15 * 1.02
    assert finite_sums > 1500


@pytest.mark.parametrize("size", SPECIAL)
@pytest.mark.parametrize("largest", SPECIAL[:-2])
def test_whatever_comes_has_a_scaling(size: float, largest: float) -> None:
    bound = bound_of(largest, 256)
    for exponent in (exponent_of(bound, [size]), exponent_for(bound)):
        assert 27 <= exponent <= 227
        check(exponent, np.inf)
    assert 2.0**-100 <= unit_of(bound) <= 2.0**100


# ---- errors --------------------------------------------------------------------------------------
def bf16(values: Any) -> Any:
    """The upper half of FP32: bfloat16, rounded towards zero."""
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


@pytest.mark.parametrize(("k", "group"), [(64, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize("largest", [2.0**-60, 0.013, 1.0, 3.7, 2.0**40])
def test_a_weight_of_one_gives_w2_bit_for_bit(k: int, group: int, largest: float) -> None:
    """One feature of one token is 1: codes times scales, whose 11 bits FP16 has.

    Of scales down to 2^-9 of the layer's largest.
    """
    rng, groups, largest = np.random.default_rng(k), k // group, float(bf16(largest))
    bound = bound_of(largest, k)
    unit, exponent = unit_of(bound), exponent_of(bound, [1.0, 0.0, 0.0])
    weight, zero = (weight_of(size, exponent, unit, 1.0) for size in (1.0, 0.0))
    assert float(weight) == 1 and float(zero) == 0
    codes = rng.integers(-8, 8, (300, groups, group)).astype(np.float64)
    scales = np.minimum(bf16(largest * np.exp2(rng.uniform(-9, 0, (300, groups)))), largest)
    for at in (0, k // 2 + 3, k - 1):
        q = np.zeros(k)
        q[at] = 1
        wanted = codes.reshape(300, k)[:, at] * scales[:, at // group]
        total = halves(np.zeros(300))
        for q_here, by in ((q[::-1], zero), (q, weight), (q[::-1], zero)):
            total = added(results_of(codes, scales, q_here.reshape(groups, -1), unit), by, total)
        assert np.array_equal(total.astype(np.float64) * scaling_back(exponent), wanted)
        assert len({*wanted.tolist()}) > 100


def one_token(rng: Any, k: int, rows: int, experts: int, uneven: float) -> tuple[Any, ...]:
    codes = rng.integers(-8, 8, (experts, rows, k)).astype(np.float64)
    scales = rng.uniform(0.5, 1.5, (experts, rows, 1)) * 0.01
    scales[0] *= uneven
    q = np.clip(np.round(rng.normal(0, 60, (experts, k)) / 4) * 4, -FP8_MAX, FP8_MAX)
    weights = rng.dirichlet(np.ones(experts))
    return codes, bf16(scales), q, weights, float(bf16(scales).max())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("uneven", [1.0, 1000.0])
@pytest.mark.parametrize("k", [64, 256])
def test_fp16_sums_are_nearly_as_exact_as_what_they_are_of(
    k: int, uneven: float, hidden: bool, parts: int
) -> None:
    """8 experts. ``hidden``: the one with the largest scales is not among the token's.

    Sums of parts of a job meet in the last of them.
    """
    rng, b_scale, rows = np.random.default_rng(k), 0.02, 512
    wrong = wanted_norm = 0.0
    for _ in range(10):
        codes, scales, q, weights, largest = one_token(rng, k, rows, 9, uneven)
        chosen = range(1, 9) if hidden else range(8)
        bound = bound_of(largest, k)
        unit = unit_of(bound)
        exponent = exponent_of(bound, weights[list(chosen)].tolist(), None, b_scale)
        weight = partial(weight_of, exponent=exponent, unit=unit, b_scale=b_scale)
        sums, wanted = [halves(np.zeros(rows)) for _ in range(parts)], np.zeros(rows)
        for i, e in enumerate(chosen):
            result = results_of(codes[e][:, None], scales[e], q[e][None], unit)
            part = i * parts // len(chosen)
            sums[part] = added(result, weight(weights[e]), sums[part])
            wanted += codes[e] @ q[e] * scales[e, :, 0] * weights[e] * b_scale
        total = sums[-1]
        for other in sums[:-1]:
            total = added(other, np.float16(1), total)
        assert np.isfinite(total).all()
        out = total.astype(np.float64) * scaling_back(exponent)
        wrong += float(((out - wanted) ** 2).sum())
        wanted_norm += float((wanted**2).sum())
    assert (wrong / wanted_norm) ** 0.5 < 1e-3
