"""Plans of the prefill path: every token and output covered, every limit kept."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from math import gcd
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_source import c_constants, c_find, c_locals, c_offsets, c_value

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.hopper import launch_prefill, plan_lists, plan_own, plan_prefill
from sglang_w4afp8.kernels.hopper import plan as all_paths
from sglang_w4afp8.kernels.hopper.build import CSRC
from sglang_w4afp8.kernels.hopper.launch import Tensors
from sglang_w4afp8.kernels.hopper.plan import CTA_SHARED_BYTES, MAX_EXPERTS, Layer, most_tokens
from sglang_w4afp8.kernels.hopper.plan_lists import TILE_TOKENS, Lists
from sglang_w4afp8.kernels.hopper.plan_prefill import PrefillPlan
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

LAYERS = [
    Layer(256, 7168, 256, 128, 128, 8, False, False),  # TP8
    Layer(256, 7168, 128, 128, 128, 8, False, True),  # TP16
    Layer(256, 7168, 128, 128, 128, 8, False, False),
    Layer(256, 7168, 64, 128, 64, 8, True, False),  # TP32
    Layer(32, 7168, 2048, 128, 128, 8, False, False),  # EP8
    Layer(128, 4096, 192, 128, 64, 8, False, False),
    Layer(128, 2048, 384, 128, 128, 10, False, True),
    Layer(160, 5120, 192, 128, 32, 6, False, False),
    Layer(16, 640, 64, 32, 32, 6, True, True),
    Layer(16, 704, 64, 64, 64, 1, True, False),
    Layer(8, 192, 320, 64, 64, 3, False, False),
    Layer(8, 256, 448, 32, 32, 2, False, True),
    Layer(MAX_EXPERTS, 7168, 512, 128, 128, 9, False, False),
    Layer(8, 64, 64, 32, 64, 2, True, True),  # of models for tests
    Layer(8, 128, 320, 128, 32, 4, False, False),
    Layer(64, 4096, 576, 128, 32, plan_prefill.MAX_TOP_K, False, True),  # the largest tables
]
OWN = [layer for layer in LAYERS if layer.inner <= plan_own.OWN_MOST_K]
"""Whose CTAs of down own outputs: their third kernel is in test_hopper_prefill_own.py."""
OLD = [layer for layer in LAYERS if layer not in OWN]
TOKENS = sorted({1, 2, 15, 16, 17, 127, 128, 129, 4095, 16_384, 32_768, *range(400, 40_001, 1800)})


def kernel_bytes(source: str, c: dict[str, Any], ring: int) -> tuple[int, int]:
    """Dynamic shared memory that ``make_ring`` lays out at the worst address, and static."""
    static = 32 * c["kQueue"]  # struct Item
    if source != "prefill_down.cu":
        static += c["kWgs"] * (c["kGatherBytes"] + 4)
    if c.get("kInner", 0) > 0:
        static += c["kSlots"] * (c["kTokens"] * 8 + 16 + 8)  # columns, complete, barriers
    more = {"Tables": SimpleNamespace(bytes=lambda: c_value(TABLE_BYTES, c))}
    extra = c_value(c_find(source, ("w4a8_prefill",), "make_ring("), c | MAKE_RING | more)[2]
    barriers = ring * c["kBars"] + c["kQueue"] * 16
    return 1024 - 128 + ring * c["kStageBytes"] + extra + barriers, static


TABLE_BYTES = c_find("prefill_tables.cuh", ("constexpr int bytes()",), "return")
SORT_TEXT = (CSRC / "prefill_sort_own.cuh").read_text()
MAKE_RING = {"shared": 0, "p": SimpleNamespace(ring=0)}


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_kernels_fit_the_hardware(layer: Layer) -> None:
    _, *matrix = planned(layer, 1, 132).launches
    matrix.insert(1, planned(layer, 40_000, 132).launches[1])  # with clusters, if it may have them
    own = matrix[2].kernel.source == "prefill_own_down.cu"
    assert own == (layer in OWN)
    for up, launch in zip((True, True, False), matrix, strict=True):
        if own and not up:
            continue
        c = c_constants(launch.kernel.source, dict(launch.kernel.defines))
        dynamic, static = kernel_bytes(launch.kernel.source, c, launch.ring)
        # A warpgroup waits for the next stage before it gives the last one back.
        assert launch.ring >= 2
        # The kernels declare 128 bytes of alignment, so no more than the rest is lost.
        assert launch.shared_bytes == dynamic + 128
        assert launch.shared_bytes + static <= CTA_SHARED_BYTES
        one_more, _ = kernel_bytes(launch.kernel.source, c, launch.ring + 1)
        room = CTA_SHARED_BYTES - static
        assert launch.ring == plan_prefill.MAX_RING or one_more + 2048 > room, "memory left over"
        assert (launch.threads, launch.tokens) == (c["kThreads"], c["kTokens"])
        assert c["kStageBytes"] % 1024 == 0 and c["kTokenBytes"] % 1024 == 0  # of the swizzle
        assert c["kK"] % 64 == 0 and c["kK"] % c["kGroup"] == 0 and c["kGroup"] % 32 == 0
        assert c["kStageBytes"] < 1 << 20, "more bytes than a barrier counts"
        shape = layer.up if up else layer.down
        assert shape.k % c["kSpan"] == 0 and c["kSorted"] == (not own)
        assert c["kPerWg"] == 1 if not own else c["kPerWg"] in (1, 2)
        assert {c["kLayoutTiles"], shape.tiles} <= {1, 2, 4} and c["kLayoutTiles"] == shape.tiles
    route = c_constants("prefill_route.cu", {})
    tables = sum(f"u64 {name}[kMaxExperts];" in SORT_TEXT for name in ("mine", "before", "all"))
    shared = planned(layer, 1, 132).launches[0].shared_bytes
    asked = tables * 8 * route["kMaxExperts"] + 4 * route["kPart"]
    assert tables == 3 and "u32 pairs[kPart];" in SORT_TEXT and shared == (asked if own else 0)
    assert route["kMaxExperts"] == route["kThreads"] == MAX_EXPERTS  # a thread for each expert
    assert route["kPart"] == plan_lists.SORT_PAIRS


@pytest.mark.parametrize("layer", OLD, ids=str)
def test_kernels_agree_on_the_order_of_the_list(layer: Layer) -> None:
    """Panels of x and q, and the tables of owners and parts."""
    plan = planned(layer, 5000, 132)
    _, up, down = (dict(launch.kernel.defines) for launch in plan.launches)
    c = c_constants("prefill_up.cu", up), c_constants("prefill_down.cu", down)
    assert plan.panel == (c[0]["kPanel"], c[1]["kPanel"]) and c[0]["kOutPanel"] == c[1]["kPanel"]
    assert c[0]["kSorted"] and all(one["kWgs"] == plan_prefill.SORTED_WARPGROUPS for one in c)
    assert all(one["kCluster"] == one["kHalves"] == 1 for one in c)
    assert layer.hidden % plan.panel[0] == 0 and layer.inner % plan.panel[1] == 0
    route = c_constants("prefill_route.cu", {})
    assert route["kBlockRows"] == c[0]["kBlockRows"] == plan_prefill.BLOCK_ROWS
    sizes = [c_offsets("prefill_lists.cuh", name)[1] for name in ("Owner", "Part")]
    assert sizes == [plan_prefill.OWNER_BYTES, plan_prefill.PART_BYTES]
    assert c[1]["kMostParts"] == plan.most_parts
    # A token has no more rows than experts; bulk copies are of 16 bytes at 16 bytes.
    assert plan.most_parts >= layer.top_k and plan.most_parts * sizes[1] % 16 == 0
    assert c[1]["kOwnerBytes"] % 16 == 0
    assert c[1]["kAdders"] == plan_prefill.ADDERS
    assert c[1]["kStreams"] * c[1]["kCells"] == plan_prefill.CELLS
    assert c[1]["kRowBytes"] == plan_prefill.BLOCK_BYTES and c[1]["kCells"] % 2 == 0
    # Behind the stages: one after the other, and barriers that are nobody else's.
    begin = c[1] | {"begin": 0}
    found = c_locals("prefill_tables.cuh", "Tables at(", "owners adders scales", begin)
    made = c_find("prefill_tables.cuh", ("Tables at(",), "return").replace("Tables{", "(")
    begins = c_value(made.replace("}", ")"), found)
    sizes = [c[1]["kOutStride"] * c[1]["kTokens"], 16 * c[1]["kTokens"]]
    sizes += [c[1]["kAdders"] * c[1]["kAdderBytes"], 4 * c[1]["kTokens"]]
    assert begins == tuple(accumulate(sizes, initial=0)) and all(at % 16 == 0 for at in begins)
    bars = []
    for name in ("scaled", "full", "stored"):
        text = c_find("prefill_tables.cuh", (f"u32 {name}()",), "return")
        bars.append(c_value(text, {"bars": begins[-1]}))
    apart = [b - a for a, b in pairwise(sorted(bars))]
    assert min(bars) == begins[-1] and min(apart) >= 8 and all(bar % 8 == 0 for bar in bars)
    assert max(bars) + 8 <= c_value(TABLE_BYTES, c[1])


def check_lists(lists: Lists, layer: Layer, tokens: int, part_pairs: int, step: int) -> None:
    """``step``: the tokens of a list are a multiple of it."""
    assert (lists.count - 1) * lists.tokens < tokens <= lists.count * lists.tokens
    assert lists.count == 1 or lists.tokens * layer.top_k % part_pairs == 0
    assert lists.parts == -(-lists.tokens * layer.top_k // part_pairs)
    # Of about one size: no list has more than another and what a CTA sorts.
    assert lists.tokens - tokens / lists.count < step
    # Most tiles: a pair for every expert, then a tile's more for another one each; or two for two.
    pairs, both = lists.tokens * layer.top_k, lists.together
    more = max(0, pairs - layer.experts) // (lists.tile_tokens * both)
    assert lists.max_tiles == 0 or (min(pairs, layer.experts) + more) * both <= lists.max_tiles


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_plans_cover_every_token_and_output(layer: Layer) -> None:
    for tokens in TOKENS:
        plan = planned(layer, tokens, 132)
        own = plan.room == 0
        assert own == (layer in OWN)
        step = plan_lists.SORT_PAIRS // gcd(plan_lists.SORT_PAIRS, layer.top_k)
        step = plan.part_pairs // layer.top_k if own else step
        check_lists(plan.up, layer, tokens, plan.part_pairs, step)
        assert plan.up.max_tiles > 0 and (plan.down.max_tiles == 0) == own
        step = plan.down.parts * 8 if own else step
        check_lists(plan.down, layer, tokens, plan.part_pairs, step)
        assert plan.part_pairs <= plan_lists.SORT_PAIRS
        pairs = tokens * layer.top_k
        assert 0 <= plan.sorters * plan.part_pairs - pairs < plan.part_pairs
        rows = c_constants("prefill_route.cu", {})["kRows"]
        others = plan.launches[0].grid[0] - plan.sorters
        if own:
            assert others == -(-tokens // rows) + layer.experts
            continue
        # They go on as long as there are rows and tokens; more than fit at a time would only wait.
        assert others == min(-(-tokens // rows), 2 * 132)
        # What every CTA of gate and up begins with, whole blocks of it; items are claimed in order.
        up_blocks = -(-layer.up.rows // (plan_prefill.SORTED_WARPGROUPS * 64))
        items = plan_prefill.EARLY_ROUNDS * 132
        assert plan.early % plan_prefill.BLOCK_ROWS == 0
        assert plan.early * up_blocks >= items * plan.launches[1].tokens
        # One list, whose tokens x and q are in the order of.
        assert plan.up == plan.down and (plan.up.count, plan.up.together) == (1, 1)
        assert plan.part_pairs % plan_prefill.ROUTE_THREADS == 0
        assert min(pairs, 5 * tokens // 2) <= plan.room < min(pairs, 5 * tokens // 2) + 256
        assert plan.room % plan_prefill.BLOCK_ROWS == 0
        # Rows of q have 28 bits, numbers of tiles 23 in a word of route's.
        assert pairs < 1 << 28 and plan.up.max_tiles < 1 << 23
        # Whatever the slots, two blocks of outputs fit, or all of them.
        blocks = -(-layer.hidden // 128)
        block_bytes = 2 * 128 * pairs
        assert min(2, blocks) * block_bytes <= plan.slice_bytes <= blocks * block_bytes
        assert plan.slice_bytes <= max(2 * block_bytes, plan_prefill.SLICE_BYTES)


def test_more_experts_per_token_than_a_warp_can_list() -> None:
    most = plan_prefill.MAX_TOP_K
    layer = Layer(256, 7168, 512, 128, 128, most, False, False)
    assert planned(layer, 500, 132).down.tokens == 500
    with pytest.raises(BackendError) as caught:
        planned(replace(layer, top_k=most + 1), 500, 132)
    assert caught.value.found == "500 tokens with 33 experts each"
    assert most == 32 and "32" in caught.value.why
    assert "(2) route every token to at most 32" in str(caught.value)
    owned = planned(replace(layer, inner=256, top_k=most + 1), 500, 132)
    assert owned.room == 0, "no lists of contributions, no limit"


@pytest.mark.parametrize("sms", [78, 113, 132])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_clusters_are_whole(layer: Layer, sms: int) -> None:
    """Each CTA has one of a stage's two copies, no tile is without a partner, and both start."""
    ahead = set(all_paths.kernels(layer, sms))
    one_block = 2 * layer.inner == 256
    least, most = (pairs * layer.experts for pairs in plan_prefill.CLUSTER_PAIRS)
    assert most == 2 * least, "so that a power of two is between them"
    first = -(-least // layer.top_k)
    seen = set()
    for tokens in {*TOKENS, first - 1, first, most // layer.top_k, most // layer.top_k + 1} - {0}:
        found = planned(layer, tokens, sms)
        _, up, down = found.launches
        defines = dict(up.kernel.defines)
        cluster = defines.get("W4_CLUSTER", 1)
        seen.add(cluster)
        pairs = tokens * layer.top_k
        may = one_block and sms % 2 == 0 and layer in OWN
        assert cluster == (2 if least <= pairs < most and may else 1)
        assert cluster == 1 or (defines["W4_PER_WG"], defines["W4_TILES"]) == (2, 1)
        assert (found.up.together, found.down.together) == (cluster, 1)
        assert up.grid[0] % cluster == 0
        shared = dict(down.kernel.defines).get("W4_CLUSTER", 1)
        assert down.grid[0] % shared == 0 and (shared == 1 or layer in OWN)
        # Kernels are built before a graph is captured.
        assert {launch.kernel for launch in found.launches} <= ahead
    assert seen == ({1, 2} if may else {1})


@pytest.mark.parametrize("sms", [78, 114, 132])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_sorters_are_resident(layer: Layer, sms: int) -> None:
    """Each waits for all others, and an SM has room for two."""
    tokens = most_tokens(layer, sms)
    assert tokens >= min(32_768, 262_144 // layer.top_k)
    for some in (tokens, *(n for n in TOKENS if n < tokens)):
        assert planned(layer, some, sms).sorters <= 2 * sms


def meta(layer: Layer, tokens: int, plan: PrefillPlan) -> list[ctypes.Structure]:
    """Arguments of the three kernels; addresses are offsets in the workspace."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    scales = [None if layer.dynamic else empty(1)] * 2
    groups = empty(layer.experts, layer.hidden, layer.inner // layer.inner_group)
    weights = [*[empty(1)] * 3, groups]
    rest = [empty(tokens, layer.top_k), empty(tokens, layer.top_k), *weights, *scales]
    t = Tensors(empty(tokens, layer.hidden), *rest, empty(1))
    launched = launch_prefill.launches_prefill(layer, plan, t, empty(1), 2.5)
    return [parameters for _, parameters in launched]


def room_at(route: ctypes.Structure, address: int | None) -> int:
    """Bytes of the workspace from an address to the next part."""
    ends = sorted({*route.workspace.at.values(), route.workspace._memory.numel()})
    return next(end for end in ends if end > (address or 0)) - (address or 0)


@pytest.mark.parametrize("layer", OLD, ids=str)
def test_workspace_has_room_for_what_is_written(layer: Layer) -> None:
    for tokens in (1, 400, 5000, 16_384, 40_000):
        plan = planned(layer, tokens, 132)
        route, up, down = meta(layer, tokens, plan)
        room = partial(room_at, route)
        pairs, mine, lists = tokens * layer.top_k, route.sorted, route.up
        c = c_constants("prefill_route.cu", {})
        assert (route.down.count, route.own.columns, lists.first) == (0, None, None)
        assert (lists.count, lists.parts, lists.together) == (1, route.sorters, 1)
        assert lists.tile_tokens == plan.launches[1].tokens == plan.launches[2].tokens
        for name in ("tiles", "header"):
            assert getattr(lists, name) == getattr(up, name) == getattr(down, name)
        assert (lists.columns, lists.max_tiles) == (up.columns, up.max_tiles)
        assert (up.lists, up.list_pairs, up.top_k) == (1, pairs, layer.top_k)
        assert room(lists.tiles) >= 16 * lists.max_tiles and room(lists.columns) >= 4 * pairs
        assert room(route.counts) >= 4 * c["kMaxExperts"] * route.sorters
        assert route.sorters == plan.sorters and route.part_pairs == plan.part_pairs
        # What route says of rows
        assert (mine.owners, mine.parts) == (down.owners, down.parts)
        assert (mine.slots, mine.total, mine.empty) == (down.slots, up.total, up.empty)
        assert mine.room == up.room == plan.room
        listed = mine.listed
        assert bytes(listed) == bytes(up.listed), "who writes the first rows, and who the others"
        assert (listed.hidden, listed.panel) == (layer.hidden, plan.panel[0])
        assert (listed.x, listed.a_scale) == (route.x, route.a_scale)
        assert (listed.columns, listed.place) == (lists.columns, mine.place)
        assert (listed.xq, listed.x_scale) == (route.xq, route.x_scale)
        assert (listed.top_k, listed.early) == (layer.top_k, plan.early)
        assert (mine.top_k, mine.most_parts) == (layer.top_k, plan.most_parts)
        parts = pairs * plan.most_parts
        assert room(mine.place) >= 8 * pairs and room(mine.owners) >= 16 * pairs
        assert room(mine.parts) >= 8 * parts
        assert mine.slots == mine.total + 4 and room(mine.slots) >= 4
        assert room(mine.empty) >= tokens and up.tokens == tokens
        at = [mine.place, mine.owners, mine.parts, route.xq, up.q, down.y]
        assert all(address % 16 == 0 for address in at), "vectors and bulk copies"
        at += [mine.total, mine.empty, route.counts, lists.tiles, lists.columns]
        assert len({*at, route.zeros, lists.header}) == len(at) + 2, "two things in one place"
        # x in the order of the list, or of tokens
        assert room(route.xq) >= max(tokens, plan.room) * layer.hidden
        assert room(route.x_scale) >= 4 * tokens and room(up.q) >= pairs * layer.inner
        assert (up.q_rows, down.b_rows) == (pairs, pairs)
        if layer.dynamic:
            assert room(up.inner) >= 4 * pairs * layer.inner and room(up.q_row_scale) >= 4 * pairs
            assert (up.b_scale, down.b_scale) == (route.x_scale, up.q_row_scale)
        assert (up.b, down.b, up.arrived) == (route.xq, up.q, route.arrived)
        assert room(down.y) >= down.y_bytes == plan.slice_bytes
        # Counters, made zero by route: claims, a bit for each item of down, its slices, tiles with
        # dynamic scales, units of rows, and the rows of each block of them.
        tiles, blocks = lists.max_tiles, -(-layer.hidden // 128)
        assert up.claimed == route.zeros and down.claimed == (up.claimed or 0) + 4
        words = -(-tiles // plan_prefill.DONE_TILES)
        assert down.summed == down.claimed + 4 and down.done == down.summed + 4
        assert down.left == down.done + 4 * words * blocks
        assert up.tile_count == down.left + 4 * blocks
        assert listed.claimed == up.tile_count + 4 * tiles * layer.dynamic
        assert listed.written == listed.claimed + 4
        zeroed = (route.zeros or 0) + 4 * route.zero_count
        assert zeroed == listed.written + 4 * plan.room // c["kBlockRows"]
        assert room(route.zeros) >= 4 * route.zero_count


def test_memory_of_a_long_call_with_expert_parallelism() -> None:
    """280 MiB are x in the order of the list, 256 q, 160 contributions; 16 say what rows are."""
    layer, tokens = Layer(32, 7168, 2048, 128, 128, 8, False, False), 16_384
    plan = planned(layer, tokens, 132)
    route, *_ = meta(layer, tokens, plan)
    large = plan.room * layer.hidden + tokens * layer.top_k * layer.inner + plan.slice_bytes
    assert large == (280 + 256 + 160) * 2**20
    assert route.workspace._memory.numel() - large < 16 * 2**20


@pytest.mark.parametrize("layer", OWN, ids=str)
def test_workspace_has_room_for_what_owners_of_outputs_read(layer: Layer) -> None:
    c = c_constants("prefill_route.cu", {})
    for tokens in (1, 400, 2049, 5000, 16_384, 40_000):
        plan = planned(layer, tokens, 132)
        route, up, down = meta(layer, tokens, plan)
        room = partial(room_at, route)
        pairs, rows = tokens * layer.top_k, plan.down.count * plan.down.tokens * layer.top_k
        own, lists = route.own, route.down
        assert rows >= pairs and rows < 1 << 28, "q_row has 28 bits for a row"
        assert (lists.tiles, lists.header, lists.columns) == (None, None, None)
        assert (lists.count, lists.parts) == (plan.down.count, plan.down.parts)
        assert (lists.together, lists.tile_tokens) == (1, TILE_TOKENS), "route divides by them"
        assert (lists.count, lists.parts) == (down.lists, down.parts)
        assert (down.list_tokens, down.top_k, own.top_k) == (plan.down.tokens, *[layer.top_k] * 2)
        assert down.list_tokens % down.parts == 0
        assert route.part_pairs == down.list_tokens // down.parts * layer.top_k == plan.part_pairs
        for name in ("columns", "twice", "sizes", "largest"):
            assert getattr(own, name) == getattr(down, name)
        assert (lists.first, own.rows, up.q) == (down.first, up.rows, down.b)
        parts = {"xq": route.xq, "rows": own.rows, "columns": own.columns, "twice": own.twice,
                 "sizes": own.sizes, "largest": own.largest, "first": lists.first,
                 "up columns": route.up.columns, "q": up.q, "counts": route.counts,
                 "zeros": route.zeros, "own counts": own.counts}  # fmt: skip
        assert len({*parts.values()}) == len(parts), "two things in one place"
        assert room(own.columns) >= 8 * rows and room(own.rows) >= 4 * pairs
        assert room(lists.first) >= 4 * (c["kMaxExperts"] + 1) * lists.count
        assert room(own.twice) >= 4 * plan.sorters and room(own.sizes) >= 4 * pairs
        assert room(own.counts) >= 8 * c["kMaxExperts"] * plan.sorters
        assert room(own.largest) >= 4 * layer.experts == 4 * down.experts
        assert own.expert_scales == layer.hidden * layer.inner // layer.inner_group
        assert own.expert_scales % 8 == 0, "read eight at a time"
        assert room(up.q) >= rows * layer.inner and (up.q_rows, down.b_rows) == (rows, rows)
        assert up.q_row_scale == down.b_scale or not layer.dynamic
        # Counters, made zero by route: claims, tiles with dynamic scales, parts handed over.
        assert down.claimed == (up.claimed or 0) + 4 and up.tile_count == down.claimed + 8
        tiles = up.lists * up.max_tiles * layer.dynamic
        jobs = plan.jobs
        assert jobs is not None and down.handed == up.tile_count + 4 * tiles
        assert (route.zeros or 0) + 4 * route.zero_count == down.handed + 4 * jobs.places
        assert (down.whole, down.shared) == (jobs.whole, jobs.shared)
        assert (down.shares, down.job_parts) == (jobs.shares, jobs.parts)
        assert room(down.sums) >= jobs.sum_bytes and down.sums % 16 == 0
        assert down.sums == route.xq or down.sums not in parts.values()
        assert room(route.zeros) >= 4 * route.zero_count
        assert (up.lists, up.list_pairs) == (plan.up.count, plan.up.tokens * layer.top_k)
        assert up.lists == 1 or up.list_pairs % plan.part_pairs == 0
