"""``down`` of the prefill path for a short K, whose CTAs own outputs (``prefill_own_down.cu``)."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from sglang_w4afp8.kernels.hopper.layout import ROW_TILE
from sglang_w4afp8.kernels.hopper.plan import (
    BARRIER_BYTES,
    CTA_SHARED_BYTES,
    MAX_EXPERTS,
    Kernel,
    Launch,
    Layer,
)
from sglang_w4afp8.kernels.hopper.plan_lists import ALIGNMENT, SORT_PAIRS, Lists

OWN_MOST_K = 256
"""Longest K for which CTAs own outputs: what they read grows with it."""
OWN_TOKENS = (256, 512, 1024)
"""Most tokens whose sums a CTA has, 128 KB of FP16."""
OWN_MOST_PAIRS = 1 << 16
"""Pairs of a list that a step can tell apart (``Step`` in prefill_own_jobs.cuh)."""
OWN_USUAL_COLUMNS = 32
"""Tokens of a list that an expert should have: the more, the less is decoding weights for each."""
OWN_MOST_COLUMNS = 48
"""Of a step; an expert with more tokens in a list takes several."""
OWN_CLUSTERS = (2, 1)
"""CTAs of it that share weights, where there are as many lists. Measured on an H100: four are
slower, as each waits for the slowest."""
OWN_CLUSTER_K = 256
"""Shortest K for which they do: a shorter one leaves little to share."""
OWN_SORTERS = 64
"""CTAs of route that sort, where lists need no more: few pairs each are soon sorted."""
OWN_SORT_BYTES = 3 * MAX_EXPERTS * 8 + SORT_PAIRS * 4
"""Shared memory of those, for experts' pairs by class and for their own (prefill_sort_own.cuh)."""
OWN_WARPGROUPS = 3
OWN_MOST_SLOTS = 12
OWN_NOBODY = 4
"""Sums beside those of tokens, for columns without a pair."""
OWN_PART_COST = 0.25
"""Of a part more, in jobs: describing it, handing its sums over. On an H100 anything from 0.2 to
0.3 chooses the fastest of what was tried (docs/kernels.md); no file was kept."""
OWN_TOKEN_SLOTS = ((12, 4), (8, 4), (6, 6), (5, 5), (4, 4), (3, 3))
"""Slots for tokens, and the warps that fill them: a slot has always the same one."""


@dataclass(frozen=True)
class Jobs:
    """Row tiles times lists, and how the last of them are shared out.

    Attributes:
        whole: jobs that one CTA does, the first ones. Counted in clusters.
        shared: jobs of the last round, if they are cut into shares.
        shares: how many. They take equally long: some are part of a job, others the end of a job
            and the beginning of the next one.
        parts: that a job is cut into, at most.
        places: jobs of CTAs that are shared: there is a sum for each of their parts but one.
        place_bytes: of such a sum.
    """

    whole: int
    shared: int
    shares: int
    parts: int
    places: int
    place_bytes: int

    @property
    def sum_bytes(self) -> int:
        """Of all sums that are handed over."""
        return self.places * (self.parts - 1) * self.place_bytes

    @classmethod
    def of(cls, jobs: int, cluster: int, clusters: int, most: int) -> Jobs:
        """Shares the jobs of the last round where that ends sooner.

        Args:
            jobs: of clusters.
            cluster: CTAs of a cluster.
            clusters: that run at a time.
            most: tokens of a list, at most.
        """
        last = jobs % clusters

        def parts(shares: int) -> int:
            """Of the job that begins furthest in a share: at so many of its ``last`` units."""
            furthest = last - gcd(last, shares)
            return (furthest + shares - 1) // last + 1

        def rounds(shares: int) -> float:
            return last / shares + OWN_PART_COST * (parts(shares) - 1)

        shares = min(range(last, clusters + 1), key=rounds) if last else 0
        place_bytes = most * ROW_TILE * 2
        if shares == last:
            return cls(jobs, 0, 1, 1, 0, place_bytes)
        return cls(jobs - last, last, shares, parts(shares), last * cluster, place_bytes)


def own_cluster(lists: int) -> int:
    """CTAs that share weights where there are so many lists."""
    return next(size for size in OWN_CLUSTERS if lists >= size)


def own_steps(layer: Layer, most: int, cluster: int, columns: int) -> int:
    """Most steps of a job: an expert has as many as the fullest of ``cluster`` lists needs.

    Args:
        layer: the sizes.
        most: tokens of a list.
        cluster: lists whose CTAs share weights.
        columns: of a step.
    """
    return layer.experts + cluster * -(-most * layer.top_k // columns)


def own_parts(layer: Layer, most: int) -> int:
    """CTAs of route that sort a list of ``most`` tokens, at least."""
    return -(-most * layer.top_k // SORT_PAIRS)


def own_tokens(layer: Layer) -> int:
    """Most tokens of a list whose sums a CTA owns; 0 where K is too long for that."""
    if layer.down.k > OWN_MOST_K or layer.down.stage_k != layer.down.k:
        return 0
    # About OWN_USUAL_COLUMNS tokens of a list have an expert.
    usual = OWN_USUAL_COLUMNS * layer.experts // layer.top_k
    most = min(OWN_TOKENS[-1], max(OWN_TOKENS[1], usual), OWN_MOST_PAIRS // layer.top_k)
    step = own_parts(layer, most) * 8
    return most // step * step


def own_down(layer: Layer, tokens: int, sms: int) -> tuple[Launch, Lists, Jobs] | None:
    """The launch whose CTAs own outputs, its lists and jobs; None where K is too long."""
    shape, group = layer.down, layer.inner_group
    most = own_tokens(layer)
    if most == 0:
        return None
    lists = -(-tokens // most)
    cluster = own_cluster(lists) if shape.k >= OWN_CLUSTER_K else 1
    lists = -(-lists // cluster) * cluster
    fewest = own_parts(layer, most)
    for split in (4, 2, 1):
        parts = fewest * split
        size = -(-tokens // (lists * parts * 8)) * parts * 8
        if size <= most and (lists * parts <= OWN_SORTERS or split == 1):
            break
    most = next(most for most in OWN_TOKENS if most >= size)
    # A step has as many columns as nearly every expert has tokens in a list.
    usual = most * layer.top_k / layer.experts
    columns = min(OWN_MOST_COLUMNS, max(16, -(-int(usual + 2.5 * usual**0.5) // 8) * 8))
    stage = shape.k * 32 + shape.k // group * 128
    fixed = (
        ALIGNMENT
        + 256
        + (most + OWN_NOBODY) * ROW_TILE * 2
        + 2 * most
        + 2 * own_steps(layer, most, cluster, columns) * 4
        + (8 + OWN_WARPGROUPS * 4) * BARRIER_BYTES
        + 1024
    )
    token_slot = columns * (shape.k + 2 * 8) + BARRIER_BYTES
    room = CTA_SHARED_BYTES - fixed
    slots = room // (stage + BARRIER_BYTES + token_slot)
    token_slots, token_warps = next(pair for pair in OWN_TOKEN_SLOTS if pair[0] <= slots)
    slots = min((room - token_slots * token_slot) // (stage + BARRIER_BYTES), OWN_MOST_SLOTS)
    kernel = Kernel(
        "prefill_own_down.cu",
        "w4a8_prefill_own_down",
        (
            ("W4_K", shape.k),
            ("W4_TILES", shape.tiles),
            ("W4_GROUP", group),
            ("W4_MINUS_EIGHT", int(layer.minus_eight)),
            ("W4_DYNAMIC", int(layer.dynamic)),
            ("W4_WGS", OWN_WARPGROUPS),
            ("W4_CLUSTER", cluster),
            ("W4_TOKENS", columns),
            ("W4_MOST_TOKENS", most),
            ("W4_WEIGHT_SLOTS", slots),
            ("W4_TOKEN_SLOTS", token_slots),
            ("W4_TOKEN_WARPS", token_warps),
            ("W4_WEIGHT_WARPS", 2 if slots % (2 * cluster) == 0 and token_warps < 6 else 1),
        ),
    )
    shared = fixed - 1024 + slots * (stage + BARRIER_BYTES) + token_slots * token_slot
    grid = sms // cluster * cluster
    threads = (OWN_WARPGROUPS + 2) * 128
    lists = -(-tokens // size)
    jobs = layer.hidden // ROW_TILE * -(-lists // cluster)
    return (
        Launch(kernel, (grid, 1), threads, shared, slots, columns),
        Lists(lists, size, 0, parts),
        Jobs.of(jobs, cluster, grid // cluster, most),
    )
