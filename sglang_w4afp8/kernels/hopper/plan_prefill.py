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
CLUSTER_PAIRS = 384
"""Pairs of an expert, on average, from which they do: with two tiles or fewer an expert would often
have one more, and one without tokens."""
WARP_TOKENS = (16, 8, 4)
"""Tokens that a warp of ``down`` adds up at a time: the most first."""
MAX_TOP_K = 8 * WARP_TOKENS[0]
"""A warp lists the contributions of its tokens, of at least one, before it adds them up."""
SUMMED_BYTES = 8
MAX_SLICE_BLOCKS = 8
MAX_RING = 8


@dataclass(frozen=True)
class Lists:
    """Runs of tokens whose pairs are sorted by expert, each on its own.

    Attributes:
        count: how many.
        tokens: of a list; the last may have fewer.
        max_tiles: room for tiles in a list.
        together: an expert has a multiple of so many tiles, the last perhaps without tokens.
    """

    count: int
    tokens: int
    max_tiles: int
    together: int = 1

    @classmethod
    def of(cls, layer: Layer, tokens: int, most_pairs: int, together: int = 1) -> Lists:
        """Lists of about ``most_pairs`` pairs for ``tokens`` tokens; whole CTAs sort a list."""
        step = SORT_PAIRS // gcd(SORT_PAIRS, layer.top_k)
        most = max(step, most_pairs // layer.top_k // step * step)
        # Of about the same size: the tiles of a short last list would be the emptiest.
        share = -(-tokens // -(-tokens // most))
        size = min(tokens, -(-share // step) * step)
        pairs = size * layer.top_k
        most_tiles = min(pairs * together, layer.experts * together + pairs // TILE_TOKENS)
        return cls(-(-tokens // size), size, most_tiles, together)


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a call and the sizes that its kernels are told.

    Attributes:
        launches: route, up, down.
        sorters: CTAs of route that sort.
        up: lists of gate and up.
        down: lists of down, and of the sums.
        slices: parts of the outputs.
        slice_blocks: blocks of 256 outputs of a slice; the last may have fewer.
        warp_tokens: tokens that a warp of ``down`` adds up at a time.
    """

    launches: tuple[Launch, Launch, Launch]
    sorters: int
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
    many = tokens * layer.top_k >= CLUSTER_PAIRS * layer.experts
    return CLUSTER if whole_blocks and many else 1


def _matrix(layer: Layer, sms: int, up: bool, cluster: int = 1) -> Launch:
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
        ),
    )
    shared = fixed + ring * stage
    return Launch(kernel, (sms, 1), THREADS, shared, ring, TILE_TOKENS)


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
    up = Lists.of(layer, tokens, UP_LIST_PAIRS, cluster)
    down = Lists.of(layer, tokens, SLICE_PAIRS)
    blocks = -(-layer.hidden // 256)
    slice_blocks = max(1, min(MAX_SLICE_BLOCKS, blocks, SLICE_PAIRS // (down.tokens * layer.top_k)))
    # More tokens of a warp keep more copies under way, but every CTA should get some.
    all_tokens = min(blocks, slice_blocks) * down.tokens // CONSUMER_WARPS
    warp_tokens = next((n for n in WARP_TOKENS if all_tokens // n >= sms), WARP_TOKENS[-1])
    sorters = -(-tokens * layer.top_k // SORT_PAIRS)
    route = Launch(
        Kernel("prefill_route.cu", "w4a8_prefill_route"),
        (sorters + -(-tokens // ROUTE_ROWS), 1),
        ROUTE_THREADS,
    )
    return PrefillPlan(
        launches=(route, _matrix(layer, sms, True, cluster), _matrix(layer, sms, False)),
        sorters=sorters,
        up=up,
        down=down,
        slices=-(-blocks // slice_blocks),
        slice_blocks=slice_blocks,
        warp_tokens=warp_tokens,
    )
