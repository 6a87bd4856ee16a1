"""The prefill path: slices, room and duplicates where tokens are in the order of the list; what
CTAs use again, and clusters.
"""

from __future__ import annotations

import pytest
import torch

from sglang_w4afp8.kernels.hopper import plan_prefill
from tests.gpu import test_hopper_moe as moe

pytestmark = moe.pytestmark
CASES = [
    moe.Case(experts=32, hidden=1024, inner=512, top_k=8),
    moe.Case(experts=32, hidden=704, inner=320, group=64, inner_group=64, top_k=7, dynamic=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("slice_bytes", [1, 2**20, 2**28])
@pytest.mark.parametrize(("room", "early_rounds"), [(0.5, 2), (8, 2), (8, 0)])
def test_slices_and_room(
    case: moe.Case,
    slice_bytes: int,
    room: float,
    early_rounds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contributions in two parts of y or in one; tokens gathered or in the order of the list.

    In that order route writes some of them, or gate and up all of them.
    """
    monkeypatch.setattr(plan_prefill, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(plan_prefill, "ROOM", room)
    monkeypatch.setattr(plan_prefill, "EARLY_ROUNDS", early_rounds)
    weights = moe.random_weights(case)
    shuffled = moe.stage_order(case, weights)
    for tokens, here in ((40, 0.5), (700, 0.125), (3000, 0.125), (1500, 1.0)):
        g = torch.Generator("cuda").manual_seed(tokens)
        x = torch.randn(tokens, case.hidden, generator=g, device="cuda").bfloat16()
        topk_weights, ids = moe.routing(case, tokens, "uniform", tokens)
        drop = torch.rand(ids.shape, generator=g, device="cuda") >= here
        ids = torch.where(drop, -1, ids)
        ids[::5, 1] = ids[::5, 0]  # an expert twice
        wanted = moe.oracle(case, weights, x, topk_weights, ids, 2.5)
        out = moe.call(case, shuffled, x, topk_weights, ids, "prefill", 2.5)
        assert moe.error(out, wanted) < moe.TOLERANCE, tokens
        for _ in range(3):
            again = moe.call(case, shuffled, x, topk_weights, ids, "prefill", 2.5)
            assert torch.equal(out, again), f"{tokens}: two runs differ"


def check(case: moe.Case, tokens: int, kind: str) -> None:
    """Two calls against the oracle, and against each other."""
    weights = moe.random_weights(case)
    x = torch.randn(tokens, case.hidden, device="cuda").bfloat16()
    route = moe.routing(case, tokens, kind, tokens)
    shuffled = moe.stage_order(case, weights)
    out = moe.call(case, shuffled, x, *route, "prefill")
    assert moe.error(out, moe.oracle(case, weights, x, *route)) < moe.TOLERANCE
    assert torch.equal(out, moe.call(case, shuffled, x, *route, "prefill")), "two runs differ"


@pytest.mark.parametrize(
    ("hidden", "inner", "tokens", "slice_bytes", "room"),
    [
        (7168, 512, 200, 1, 8),
        (7168, 512, 200, 2**28, 8),
        (7168, 512, 1100, 2**28, 8),  # tiles of more than 128 tokens
        (7168, 512, 1100, 2**28, 0.5),  # gathered
        (7168, 256, 1100, 2**28, 8),
        (7168, 128, 1100, 2**28, 8),
        (7168, 128, 200, 2**28, 8),  # gate and up in clusters
        (5120, 256, 500, 2**28, 8),  # items of gate and up in halves, jobs of down in shares
        (2560, 256, 1000, 2**28, 8),  # shares of clusters
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_few_items_for_each_cta(
    hidden: int,
    inner: int,
    tokens: int,
    slice_bytes: int,
    room: float,
    dynamic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that CTAs share and use again, in calls short enough for a race detector."""
    monkeypatch.setattr(plan_prefill, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(plan_prefill, "ROOM", room)
    case = moe.Case(experts=6, hidden=hidden, inner=inner, top_k=4, dynamic=dynamic)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = plan_prefill.plan_prefill(case.layer, tokens, sms)
    clusters = dict(plan.launches[1].kernel.defines).get("W4_CLUSTER", 1) == 2
    assert clusters == (inner == 128 and tokens == 200)
    if hidden < 7168 and sms == 132:
        assert plan.jobs is not None and plan.jobs.shares % plan.jobs.shared != 0
    check(case, tokens, "holes")


@pytest.mark.parametrize("inner", [64, 192, 704, 1408, 2048, 2112, 4160])
def test_few_items_with_rows_of_any_width(inner: int) -> None:
    """With per-token scales rows of each width are quantised in their own way, the widest ones
    without registers to hold them.
    """
    group = 128 if inner % 128 == 0 else 64
    case = moe.Case(experts=6, hidden=1024, inner=inner, inner_group=group, top_k=4, dynamic=True)
    check(case, 300, "holes")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "holes"])
def test_clusters_with_many_items(kind: str, dynamic: bool) -> None:
    """Slots are used again and again, by tiles with and without a partner that has tokens."""
    tokens = 8192
    case = moe.Case(experts=256, hidden=128, inner=128, top_k=4, dynamic=dynamic)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    _, up, _ = plan_prefill.plan_prefill(case.layer, tokens, sms).launches
    assert dict(up.kernel.defines).get("W4_CLUSTER") == 2
    check(case, tokens, kind)


@pytest.mark.parametrize("inner", [256, 128])
def test_per_token_scales_with_several_lists(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of each list are counted on their own."""
    monkeypatch.setattr(plan_prefill, "UP_LIST_PAIRS", 1024)
    case = moe.Case(experts=8, hidden=512, inner=inner, top_k=4, dynamic=True)
    tokens = 2000
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert plan_prefill.plan_prefill(case.layer, tokens, sms).up.count > 1
    check(case, tokens, "holes")
