"""The launches of the ``prefill`` path: hundreds of tokens and more. Integers only, no GPU.

``route`` sorts the (token, k) pairs by expert and quantises x; ``up`` and ``down`` are persistent
kernels, one CTA per SM, that claim tiles of at most 128 tokens by 256 weight rows. Where experts
have several tiles, the CTAs of ``up`` form pairs (clusters) that work on two tiles of an expert and
share its weights: each reads half of them from L2 for both. What the experts contribute to a token
goes from ``down``'s tiles to its sums through a ring of three buffers: no tensor of
``M · top_k · hidden`` values is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.hopper.layout import ROW_TILE
from sglang_w4afp8.kernels.hopper.plan import (
    BARRIER_BYTES,
    CTA_SHARED_BYTES,
    Kernel,
    Launch,
    Layer,
)

TILE_TOKENS = 128
THREADS = 384
CONSUMER_WARPS = 8
ROUTE_THREADS = 512
SORT_PAIRS = 4_096
"""Pairs that a CTA of route sorts."""
ROUTE_ROWS = 4
"""Rows of x that a CTA of route quantises."""
QUEUE = 4
"""Items that a CTA claims ahead."""
STAGE_BARRIER_BYTES = 32
ALIGNMENT = 1024
"""Of a stage: the swizzle of its tokens repeats after so many bytes."""
BUFFERS = 3
"""Slices of contributions in memory at a time."""
SLICE_PAIRS = 262_144
"""Pairs times blocks of 256 outputs of a slice, 128 MB of BF16. Measured on an H100: smaller slices
do not stay in L2 either, and wait for each other more often."""
UP_LIST_PAIRS = 131_072
"""Pairs of a list of gate and up: the longer, the fuller are its tiles."""
CLUSTER = 2
"""CTAs of gate and up that may share weights."""
CLUSTER_PAIRS = 96
"""Pairs of an expert, on average, from which they do. Measured on an H100: 10 % faster at 128."""
CLUSTER_TOKENS = 8_192
"""Tokens up to which they do. With twice as many, 4 % slower: tokens come from memory then, and the
CTAs of a cluster wait for each other's."""
WARP_TOKENS = (16, 8, 4)
"""Tokens that a warp of ``down`` adds up at a time: the most first."""
MAX_TOP_K = 8 * WARP_TOKENS[0]
"""A warp lists the contributions of its tokens, of at least one, before it adds them up."""
SUMMED_BYTES = 8
MAX_SLICE_BLOCKS = 8
OWN_MOST_K = 256
"""Longest K for which CTAs own outputs: what they read grows with it."""
OWN_TOKENS = (256, 512, 1024)
"""Most tokens whose sums a CTA has, 128 KB of FP16."""
OWN_USUAL_COLUMNS = 32
"""Tokens of a list that an expert should have: the more, the less is decoding weights for each."""
OWN_MOST_COLUMNS = 48
"""Of a step; an expert with more tokens in a list takes several."""
OWN_CLUSTERS = (2, 1)
"""CTAs of it that share weights, where there are as many lists. Measured on an H100: four are
slower, as each waits for the slowest."""
OWN_SORTERS = 64
"""CTAs of route that sort, where lists need no more: few pairs each are soon sorted."""
OWN_WARPGROUPS = 3
OWN_MOST_SLOTS = 12
OWN_TOKEN_SLOTS = ((12, 4), (8, 4), (6, 6), (5, 5), (4, 4), (3, 3))
"""Slots for tokens, and the warps that fill them: a slot has always the same one."""
MAX_RING = 8


@dataclass(frozen=True)
class Lists:
    """Runs of tokens whose pairs are sorted by expert, each on its own.

    Attributes:
        count: how many.
        tokens: of a list; the last may have fewer.
        max_tiles: room for tiles in a list.
        together: an expert has a multiple of so many tiles, the last perhaps without tokens.
        parts: CTAs of route that sort a list; the last list may need fewer.
    """

    count: int
    tokens: int
    max_tiles: int
    parts: int
    together: int = 1

    @classmethod
    def of(
        cls, layer: Layer, tokens: int, most_pairs: int, together: int = 1, part_tokens: int = 0
    ) -> Lists:
        """Lists of about ``most_pairs`` pairs for ``tokens`` tokens; whole CTAs sort a list.

        Args:
            layer: the sizes.
            tokens: M.
            most_pairs: of a list.
            together: see the class.
            part_tokens: that a CTA sorts; 0: as many as have :data:`SORT_PAIRS` pairs, if need be
                with a token's pairs in two CTAs.
        """
        step = part_tokens or SORT_PAIRS // gcd(SORT_PAIRS, layer.top_k)
        part_pairs = part_tokens * layer.top_k or SORT_PAIRS
        most = max(step, most_pairs // layer.top_k // step * step)
        # Of about the same size: the tiles of a short last list would be the emptiest.
        share = -(-tokens // -(-tokens // most))
        size = min(tokens, -(-share // step) * step)
        pairs = size * layer.top_k
        most_tiles = min(pairs * together, layer.experts * together + pairs // TILE_TOKENS)
        return cls(-(-tokens // size), size, most_tiles, -(-pairs // part_pairs), together)


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a call and the sizes that its kernels are told.

    Attributes:
        launches: route, up, down.
        sorters: CTAs of route that sort.
        part_pairs: pairs that such a CTA sorts.
        up: lists of gate and up.
        down: lists of down, and of the sums.
        slices: parts of the outputs; 0 where CTAs own outputs (prefill_own_down.cu).
        slice_blocks: blocks of 256 outputs of a slice; the last may have fewer.
        warp_tokens: tokens that a warp of ``down`` adds up at a time.
    """

    launches: tuple[Launch, Launch, Launch]
    sorters: int
    part_pairs: int
    up: Lists
    down: Lists
    slices: int
    slice_blocks: int
    warp_tokens: int


def _cluster(layer: Layer, tokens: int, sms: int) -> int:
    """CTAs of gate and up that share weights.

    Two where experts have several tiles, if each CTA has one of the two copies of every stage: all
    blocks of an expert's rows must have four row tiles.
    """
    whole_blocks = layer.up.rows // ROW_TILE % 4 == 0 and sms % CLUSTER == 0
    many = tokens * layer.top_k >= CLUSTER_PAIRS * layer.experts and tokens <= CLUSTER_TOKENS
    # With scales of tokens, sums of 128 columns leave too few registers.
    return CLUSTER if whole_blocks and many and not layer.dynamic else 1


def _matrix(layer: Layer, sms: int, up: bool, cluster: int = 1, panel: int = 0) -> Launch:
    """``panel``: columns of a panel of q where CTAs of down own outputs, else 0."""
    shape, group = (layer.up, layer.group) if up else (layer.down, layer.inner_group)
    row_tiles = shape.rows // ROW_TILE
    # Two row tiles a warpgroup, unless a quarter or more of the last block would be empty.
    per_wg = 2 if not up or row_tiles % 4 == 0 or row_tiles > 12 else 1
    k = shape.stage_k
    weights = 2 * per_wg * (k * 32 + k // group * 128)
    stage = -(-(weights + TILE_TOKENS * k) // ALIGNMENT) * ALIGNMENT + STAGE_BARRIER_BYTES
    # Rows of features; lists of contributions.
    gathered, summed = (
        2 * TILE_TOKENS * (per_wg * 32 + 16),
        CONSUMER_WARPS * MAX_TOP_K * SUMMED_BYTES,
    )
    static = (gathered if up else summed) + 1024
    # Besides stages: where down gathers an item's results, and what alignment may cost.
    fixed = (0 if up else 2 * TILE_TOKENS * 256) + ALIGNMENT + QUEUE * BARRIER_BYTES
    ring = min(MAX_RING, (CTA_SHARED_BYTES - static - fixed) // stage)
    kernel = Kernel(
        "prefill_up.cu" if up else "prefill_down.cu",
        "w4a8_prefill_up" if up else "w4a8_prefill_down",
        (
            ("W4_K", shape.stage_k),
            ("W4_TILES", shape.tiles),
            ("W4_GROUP", group),
            ("W4_MINUS_EIGHT", int(layer.minus_eight)),
            ("W4_PER_WG", per_wg),
            ("W4_DYNAMIC", int(layer.dynamic)),
            *((("W4_CLUSTER", cluster),) if cluster > 1 else ()),
            *((("W4_PANEL", panel),) if up else ()),
        ),
    )
    shared = fixed + ring * stage
    return Launch(kernel, (sms, 1), THREADS, shared, ring, TILE_TOKENS)


def _own_cluster(lists: int) -> int:
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


def _own_parts(layer: Layer, most: int) -> int:
    return -(-most * layer.top_k // SORT_PAIRS)


def own_tokens(layer: Layer) -> int:
    """Most tokens of a list whose sums a CTA owns; 0 where K is too long for that."""
    if layer.down.k > OWN_MOST_K or layer.down.stage_k != layer.down.k:
        return 0
    # About OWN_USUAL_COLUMNS tokens of a list have an expert.
    usual = OWN_USUAL_COLUMNS * layer.experts // layer.top_k
    most = min(OWN_TOKENS[-1], max(OWN_TOKENS[1], usual))
    step = _own_parts(layer, most) * 8
    return most // step * step


def most_prefill_tokens(layer: Layer, sms: int) -> int:
    """The largest M for which all CTAs that sort are resident, two to an SM."""
    most = own_tokens(layer)
    if most == 0:
        return 2 * sms * SORT_PAIRS // layer.top_k
    lists = 2 * sms // _own_parts(layer, most)
    return lists // OWN_CLUSTERS[0] * OWN_CLUSTERS[0] * most


def _own_down(layer: Layer, tokens: int, sms: int) -> tuple[Launch, Lists] | None:
    """The launch whose CTAs own outputs, and its lists; None where K is too long."""
    shape, group = layer.down, layer.inner_group
    most = own_tokens(layer)
    if most == 0:
        return None
    lists = -(-tokens // most)
    cluster = _own_cluster(lists)
    lists = -(-lists // cluster) * cluster
    fewest = _own_parts(layer, most)
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
        + (most + 1) * ROW_TILE * 2
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
    return Launch(kernel, (grid, 1), threads, shared, slots, columns), Lists(
        -(-tokens // size), size, 0, parts
    )


def _route(tokens: int, sorters: int, experts: int) -> Launch:
    """``experts``: whose scales are looked through, a CTA each."""
    kernel = Kernel("prefill_route.cu", "w4a8_prefill_route")
    return Launch(kernel, (sorters + -(-tokens // ROUTE_ROWS) + experts, 1), ROUTE_THREADS)


def plan_prefill(layer: Layer, tokens: int, sms: int) -> PrefillPlan:
    """The launches for ``tokens`` tokens on a card with ``sms`` SMs.

    Args:
        layer: the sizes.
        tokens: M, at least 1.
        sms: multiprocessors.

    Raises:
        BackendError: more experts per token than a warp can list.
    """
    if layer.top_k > MAX_TOP_K:
        raise BackendError(
            f"{tokens} tokens with {layer.top_k} experts each",
            f"a warp of the prefill path adds up the experts of a token from a list of {MAX_TOP_K}",
            [
                "export SGLANG_W4AFP8_MOE_BACKEND=torch",
                f"route every token to at most {MAX_TOP_K} experts",
            ],
        )
    cluster = _cluster(layer, tokens, sms)
    own = _own_down(layer, tokens, sms)
    if own is not None:
        launch, lists = own
        part_tokens = lists.tokens // lists.parts
        sorters = -(-tokens // part_tokens)
        return PrefillPlan(
            launches=(
                _route(tokens, sorters, layer.experts),
                _matrix(layer, sms, True, cluster, 64 if layer.inner % 128 else 128),
                launch,
            ),
            sorters=sorters,
            part_pairs=part_tokens * layer.top_k,
            up=Lists.of(layer, tokens, UP_LIST_PAIRS, cluster, part_tokens),
            down=lists,
            slices=0,
            slice_blocks=0,
            warp_tokens=0,
        )
    up = Lists.of(layer, tokens, UP_LIST_PAIRS, cluster)
    down = Lists.of(layer, tokens, SLICE_PAIRS)
    blocks = -(-layer.hidden // 256)
    slice_blocks = max(1, min(MAX_SLICE_BLOCKS, blocks, SLICE_PAIRS // (down.tokens * layer.top_k)))
    # More tokens of a warp keep more copies under way, but every CTA should get some.
    all_tokens = min(blocks, slice_blocks) * down.tokens // CONSUMER_WARPS
    warp_tokens = next((n for n in WARP_TOKENS if all_tokens // n >= sms), WARP_TOKENS[-1])
    sorters = -(-tokens * layer.top_k // SORT_PAIRS)
    return PrefillPlan(
        launches=(
            _route(tokens, sorters, 0),
            _matrix(layer, sms, True, cluster),
            _matrix(layer, sms, False),
        ),
        sorters=sorters,
        part_pairs=SORT_PAIRS,
        up=up,
        down=down,
        slices=-(-blocks // slice_blocks),
        slice_blocks=slice_blocks,
        warp_tokens=warp_tokens,
    )
