"""The launches of the ``prefill`` path, for many tokens. Integers only, no GPU.

``route`` sorts the (token, k) pairs by expert and quantises x, or the first rows of it; ``up`` and
``down`` are persistent kernels, one CTA per SM. With a K of ``down`` up to 256 its CTAs own
outputs, tokens of ``up`` are gathered into tiles of at most 128 by 256 weight rows, and where
experts have 256 rows and about one tile or two, the CTAs of ``up`` form pairs (clusters) that share
an expert's weights. With a longer K tokens lie in the order of the list, tiles have at most 192
tokens and 128 weight rows, and what several experts contribute to a token goes from tile to tile of
``down`` through slots in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.hopper.layout import ROW_TILE
from sglang_w4afp8.kernels.hopper.plan import (
    BARRIER_BYTES,
    CTA_SHARED_BYTES,
    Kernel,
    Launch,
    Layer,
)
from sglang_w4afp8.kernels.hopper.plan_lists import ALIGNMENT, SORT_PAIRS, TILE_TOKENS, Lists
from sglang_w4afp8.kernels.hopper.plan_own import (
    OWN_CLUSTERS,
    OWN_SORT_BYTES,
    OWN_SORTERS,
    Jobs,
    own_down,
    own_parts,
    own_tokens,
)

THREADS = 384
ROUTE_THREADS = 512
ROUTE_ROWS = 4
"""Rows of x that a CTA of route quantises at a time. Where tokens are in the order of the list,
there are no more CTAs than fit, which go on until all is done."""
QUEUE = 2
"""Slots for the items that a CTA has claimed."""
STAGE_BARRIER_BYTES = 32
SORTED_WARPGROUPS = 2
"""Consumers where tokens are in the order of the list: a row tile each, so that one has work for
the matrix unit while the other scales and adds."""
SORTED_TOKENS = 192
"""Most tokens of a tile there: decoding weights is paid for each tile."""
SORTED_STAGE_K = 128
ROOM = 2.5
"""Rows of x in the order of the list, for every token: with expert parallelism tokens have fewer
pairs than that, and where they have more, rows are gathered from x in the order of tokens."""
SLICE_BYTES = 160 * 2**20
"""Contributions in memory, if there are as many. Two blocks of outputs must fit for all pairs."""
BLOCK_BYTES = SORTED_WARPGROUPS * 128
"""Contributions of a pair to a block."""
OWNER_BYTES, PART_BYTES = 16, 8
ADDERS, CELLS = 2, 24
"""Warps of down that add up beside others, and the contributions that each has asked for: they come
to shared memory."""
PAIR_BYTES = 20
"""Of shared memory for two contributions to a token."""
DONE_TILES = 32
"""Tiles of which a word says whether their contributions to a block are there."""
BLOCK_ROWS = 256
"""Rows of x in the order of the list lie in blocks of so many."""
EARLY_ROUNDS = 2
"""Items of each CTA of gate and up whose rows of x are there when it begins. Two of its warps write
the others as it goes."""
UP_LIST_PAIRS = 131_072
"""Pairs of a list of gate and up: the longer, the fuller are its tiles."""
CLUSTER = 2
"""CTAs of gate and up that may share weights."""
CLUSTER_ROWS = 256
"""Rows of gate and up that an expert has where they do: one block, four row tiles."""
CLUSTER_PAIRS = (96, 192)
"""Pairs of an expert, on average, from which and below which they do: about a tile or two. An
expert's tiles come in twos then, and of the experts that skewed routing leaves few pairs, both have
half of them. Faster on an H100 with uniform routing, slower with zipf's, more so with two
blocks."""
MAX_TOP_K = 32
"""Where CTAs do not own outputs: a warp of route has a lane for each pair of a token."""
MAX_RING = 8


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a call and the sizes that its kernels are told.

    Attributes:
        launches: route, up, down.
        sorters: CTAs of route that sort.
        part_pairs: pairs that such a CTA sorts.
        up: lists of gate and up.
        down: lists of down, and of the sums.
        room: rows of x in the order of the list; 0 where CTAs own outputs (prefill_own_down.cu).
        early: rows of them that route writes; up writes the others.
        panel: columns of a panel of x then, and of one of q.
        most_parts: contributions to a token for which there is room; even.
        slice_bytes: contributions in memory.
        jobs: of down, where its CTAs own outputs.
    """

    launches: tuple[Launch, Launch, Launch]
    sorters: int
    part_pairs: int
    up: Lists
    down: Lists
    room: int = 0
    early: int = 0
    panel: tuple[int, int] = (0, 0)
    most_parts: int = 0
    slice_bytes: int = 0
    jobs: Jobs | None = None


def _cluster(layer: Layer, tokens: int, sms: int) -> int:
    """CTAs of gate and up that share weights.

    Each has one of the two copies of every stage, so the block must have all its row tiles.
    """
    one_block = layer.up.rows == CLUSTER_ROWS and sms % CLUSTER == 0
    least, most = (pairs * layer.experts for pairs in CLUSTER_PAIRS)
    several = least <= tokens * layer.top_k < most
    return CLUSTER if one_block and several else 1


def _defines(layer: Layer, up: bool) -> tuple[tuple[str, int], ...]:
    shape, group = (layer.up, layer.group) if up else (layer.down, layer.inner_group)
    inner = (("W4_INNER", layer.inner),) if up and layer.dynamic else ()
    return (
        ("W4_K", shape.stage_k),
        ("W4_TILES", shape.tiles),
        ("W4_GROUP", group),
        ("W4_MINUS_EIGHT", int(layer.minus_eight)),
        ("W4_DYNAMIC", int(layer.dynamic)),
        *inner,
    )


def _ring(
    layer: Layer, up: bool, stage_k: int, row_tiles: int, token_bytes: int, room: int
) -> tuple[int, int]:
    """Stages that fit into ``room`` bytes, and the bytes that they take."""
    group = layer.group if up else layer.inner_group
    weights = row_tiles * (stage_k * 32 + stage_k // group * 128)
    stage = -(-(weights + token_bytes) // ALIGNMENT) * ALIGNMENT + STAGE_BARRIER_BYTES
    ring = min(MAX_RING, room // stage)
    return ring, ring * stage


def _own_up(layer: Layer, sms: int, cluster: int, panel: int) -> Launch:
    """Gate and up for a ``down`` whose CTAs own outputs; ``panel``: columns of a panel of q."""
    shape = layer.up
    row_tiles = shape.rows // ROW_TILE
    # Two row tiles a warpgroup, unless a quarter or more of the last block would be empty.
    per_wg = 2 if row_tiles % 4 == 0 or row_tiles > 12 else 1
    static = 2 * TILE_TOKENS * (per_wg * 32 + 16) + 1024  # static scales: rows of features
    fixed = ALIGNMENT + QUEUE * BARRIER_BYTES
    room = CTA_SHARED_BYTES - static - fixed
    token_bytes = TILE_TOKENS * shape.stage_k
    ring, stages = _ring(layer, True, shape.stage_k, 2 * per_wg, token_bytes, room)
    more = (("W4_PER_WG", per_wg), ("W4_PANEL", panel))
    clusters = (("W4_CLUSTER", cluster),) if cluster > 1 else ()
    kernel = Kernel("prefill_up.cu", "w4a8_prefill_up", _defines(layer, True) + more + clusters)
    return Launch(kernel, (sms, 1), THREADS, fixed + stages, ring, TILE_TOKENS)


def _panel(stage_k: int) -> int:
    """Columns of a panel of tokens, where the layout has stages of ``stage_k``."""
    return 64 if stage_k % SORTED_STAGE_K else 128


def _sorted_matrix(
    layer: Layer, sms: int, up: bool, most_parts: int, row_scales: bool = False
) -> Launch:
    """Gate and up, or down, on tokens in the order of the list."""
    shape = layer.up if up else layer.down
    stage_k = SORTED_STAGE_K if shape.stage_k % SORTED_STAGE_K == 0 else shape.stage_k
    asked = ADDERS * (CELLS * BLOCK_BYTES + 32 * (most_parts // 2) * PAIR_BYTES)
    out = SORTED_TOKENS * (BLOCK_BYTES + 16 + 4)
    behind = 0 if up else out + SORTED_TOKENS * OWNER_BYTES + asked + 128
    static = (SORTED_WARPGROUPS * SORTED_TOKENS * (32 + 16) if up else 0) + 1024
    fixed = ALIGNMENT + QUEUE * BARRIER_BYTES + behind
    room = CTA_SHARED_BYTES - static - fixed
    token_bytes = SORTED_TOKENS * (stage_k + (4 if row_scales else 0))
    ring, stages = _ring(layer, up, stage_k, SORTED_WARPGROUPS, token_bytes, room)
    more: tuple[tuple[str, int], ...] = (("W4_PER_WG", 1), ("W4_SORTED", 1))
    if row_scales:
        more += (("W4_ROW_SCALES", 1),)
    if up:
        more += (("W4_PANEL", _panel(layer.down.stage_k)),)
    else:
        more += (("W4_PARTS", most_parts),)
    kernel = Kernel(
        "prefill_up.cu" if up else "prefill_down.cu",
        "w4a8_prefill_up" if up else "w4a8_prefill_down",
        _defines(layer, up) + more,
    )
    return Launch(kernel, (sms, 1), THREADS, fixed + stages, ring, SORTED_TOKENS)


def takes_row_scales(layer: Layer) -> bool:
    """Whether ``up`` can read E4M3 rows with a scale per 128 columns, as a dispatcher sends them.

    It can where tokens lie in the order of the list, in stages of 128 columns.
    """
    stages = layer.up.stage_k % SORTED_STAGE_K == 0
    return own_tokens(layer) == 0 and stages and layer.top_k <= MAX_TOP_K


def most_prefill_tokens(layer: Layer, sms: int) -> int:
    """The largest M for which all CTAs that sort are resident, two to an SM."""
    most = own_tokens(layer)
    if most == 0:
        return 2 * sms * SORT_PAIRS // layer.top_k
    lists = 2 * sms // own_parts(layer, most)
    return lists // OWN_CLUSTERS[0] * OWN_CLUSTERS[0] * most


def _route(ctas: int, shared: int = 0, row_scales: bool = False) -> Launch:
    defines = (("W4_ROW_SCALES", 1),) if row_scales else ()
    kernel = Kernel("prefill_route.cu", "w4a8_prefill_route", defines)
    return Launch(kernel, (ctas, 1), ROUTE_THREADS, shared)


@lru_cache  # every layer of a forward pass asks for the same
def plan_prefill(layer: Layer, tokens: int, sms: int, row_scales: bool = False) -> PrefillPlan:
    """The launches for ``tokens`` tokens on a card with ``sms`` SMs.

    Args:
        layer: the sizes.
        tokens: M, at least 1.
        sms: multiprocessors.
        row_scales: they are E4M3 with a scale per 128 columns; see :func:`takes_row_scales`.

    Raises:
        BackendError: more experts per token than a warp has lanes, where CTAs do not own outputs.
    """
    cluster = _cluster(layer, tokens, sms)
    own = own_down(layer, tokens, sms)
    if own is not None:
        launch, lists, jobs = own
        part_tokens = lists.tokens // lists.parts
        sorters = -(-tokens // part_tokens)
        return PrefillPlan(
            launches=(
                # The last ones look through an expert's scales each.
                _route(sorters + -(-tokens // ROUTE_ROWS) + layer.experts, OWN_SORT_BYTES),
                _own_up(layer, sms, cluster, 64 if layer.inner % 128 else 128),
                launch,
            ),
            sorters=sorters,
            part_pairs=part_tokens * layer.top_k,
            up=Lists.of(layer, tokens, UP_LIST_PAIRS, cluster, part_tokens),
            down=lists,
            jobs=jobs,
        )
    if layer.top_k > MAX_TOP_K:
        raise BackendError(
            f"{tokens} tokens with {layer.top_k} experts each",
            f"the prefill path has a lane of a warp for each of them, and a warp has {MAX_TOP_K}",
            [
                "export SGLANG_W4AFP8_MOE_BACKEND=torch",
                f"route every token to at most {MAX_TOP_K} experts",
            ],
        )
    pairs = tokens * layer.top_k
    part_pairs = min(SORT_PAIRS, max(512, -(-pairs // (OWN_SORTERS * 512)) * 512))
    sorters = -(-pairs // part_pairs)
    most_tiles = min(pairs, layer.experts + pairs // SORTED_TOKENS)
    lists = Lists(1, tokens, most_tiles, sorters, tile_tokens=SORTED_TOKENS)
    most_parts = layer.top_k + layer.top_k % 2
    block_bytes = pairs * BLOCK_BYTES
    blocks, up_blocks = (
        -(-rows // (SORTED_WARPGROUPS * ROW_TILE)) for rows in (layer.hidden, layer.up.rows)
    )
    early = -(-EARLY_ROUNDS * sms * SORTED_TOKENS // (up_blocks * BLOCK_ROWS)) * BLOCK_ROWS
    return PrefillPlan(
        launches=(
            _route(sorters + min(-(-tokens // ROUTE_ROWS), 2 * sms), 0, row_scales),
            _sorted_matrix(layer, sms, True, most_parts, row_scales),
            _sorted_matrix(layer, sms, False, most_parts),
        ),
        sorters=sorters,
        part_pairs=part_pairs,
        up=lists,
        down=lists,
        room=-(-min(pairs, int(tokens * ROOM)) // BLOCK_ROWS) * BLOCK_ROWS,
        early=early,
        panel=(_panel(layer.up.stage_k), _panel(layer.down.stage_k)),
        most_parts=most_parts,
        slice_bytes=min(blocks * block_bytes, max(2 * block_bytes, SLICE_BYTES)),
    )
