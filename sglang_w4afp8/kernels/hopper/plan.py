"""Which Hopper kernels run a call, with what grid and shared memory. Integers only, no GPU.

The path is chosen by the number of tokens alone, since nothing may wait for the routing:

* ``small``, two launches. Every token is a column for every expert; a CTA quantises the tokens
  itself and keeps them in shared memory. The second kernel owns 64 output rows for all experts, so
  it also adds the experts up.
* ``medium``, three launches: token lists and FP8 of x; gate and up; down with the sum over experts,
  again by 64 output rows a CTA, in shared memory.
* ``large``, four launches: the same first two; down; sum over experts.
* ``prefill``, three launches, planned in :mod:`sglang_w4afp8.kernels.hopper.plan_prefill`.

The stages of all work units of gate and up form one list that is dealt out in equal runs, so that
each CTA streams the same number of bytes whatever the routing is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from sglang_w4afp8.kernels.hopper.layout import StageShape

SM_SHARED_BYTES = 233_472
"""Shared memory of a Hopper SM; each resident CTA takes 1 KB more than it asks for."""
CTA_SHARED_BYTES = 232_448
CONSUMERS = 256
THREADS = CONSUMERS + 32
BARRIER_BYTES = 16
STATIC_BYTES = 6_144
"""Room for a kernel's own tables."""

SMALL_TOKENS = 8
MAX_SMALL_TOP_K = 16
MAX_MEDIUM_TOKENS = 256
MAX_MEDIUM_PAIRS = 2048
MAX_EXPERTS = 512
TILE_TOKENS = (8, 16, 32, 64)
COUNTERS = 1 << 14
"""int32 counters of a layer: two for each CTA of gate and up, one for each token tile or slot."""
ROUTE_THREADS = 512
COMBINE_THREADS = 128


class Limits(NamedTuple):
    """The most tokens that each path but the last is given; 0 for a path that is not to be used.

    Field names are names of paths, in the order of growing calls. Measured ones come from
    :mod:`sglang_w4afp8.kernels.hopper.tables`, others from :func:`default_limits`.
    """

    small: int
    medium: int
    large: int


PATHS = (*Limits._fields, "prefill")
UNLIMITED = 1 << 30
"""A limit that no call exceeds."""


@dataclass(frozen=True)
class Layer:
    """The sizes of one rank's layer.

    Attributes:
        experts: E.
        hidden: K of gate and up, rows of down.
        inner: N of this rank: half the rows of w13, K of w2.
        group: INT4 codes per scale of w13.
        inner_group: of w2.
        top_k: experts per token.
        minus_eight: whether a weight is −8.
        dynamic: per-token activation scales instead of one static scale per projection.
        limits: which path a number of tokens takes; None for :func:`default_limits`.
    """

    experts: int
    hidden: int
    inner: int
    group: int
    inner_group: int
    top_k: int
    minus_eight: bool
    dynamic: bool
    limits: Limits | None = None

    @property
    def up(self) -> StageShape:
        """Cut of w13."""
        return StageShape.of(2 * self.inner, self.hidden, self.group, True)

    @property
    def down(self) -> StageShape:
        """Cut of w2."""
        return StageShape.of(self.hidden, self.inner, self.inner_group, False)


@dataclass(frozen=True)
class Kernel:
    """One compilation: a file of ``csrc/``, its entry and its macros."""

    source: str
    entry: str
    defines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: what runs.
        grid: CTAs.
        threads: per CTA.
        shared_bytes: dynamic shared memory.
        ring: stages in flight per CTA, 0 where there is no ring.
        tokens: columns of a tile, 0 where there are none.
    """

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    shared_bytes: int = 0
    ring: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """The launches of a call, in order, and the sizes of their workspace.

    Attributes:
        path: one of :data:`PATHS` but ``prefill``.
        launches: in stream order.
        tiles: most token tiles, or slots (small).
    """

    path: str
    launches: tuple[Launch, ...]
    tiles: int


ROUTE = Kernel("route.cu", "w4a8_route")
COMBINE = Kernel("combine.cu", "w4a8_combine")


def why_not(hidden: int, inner: int, experts: int, group: int, inner_group: int) -> str | None:
    """Why these kernels cannot run a layer of these sizes, as half a sentence, or None."""
    if experts > MAX_EXPERTS:
        return f"{experts} experts on one rank (at most {MAX_EXPERTS})"
    for name, size in (("hidden size", hidden), ("intermediate size of this rank", inner)):
        if size % 32:
            return f"{name} {size} is not a multiple of 32"
    for name, size in (("group", group), ("w2 group", inner_group)):
        if size not in (32, 64, 128):
            return f"{name} of {size} (32, 64 and 128 are built)"
    return None


def _matrix_kernel(
    layer: Layer, source: str, entry: str, up: bool, tokens: int, **more: int
) -> Kernel:
    shape = layer.up if up else layer.down
    defines = {
        "W4_K": shape.stage_k,
        "W4_TOKENS": tokens,
        "W4_GROUP": layer.group if up else layer.inner_group,
        "W4_MINUS_EIGHT": int(layer.minus_eight),
        **more,
    }
    return Kernel(source, entry, tuple(defines.items()))


def stage_bytes(shape: StageShape, group: int, token_bytes: int) -> int:
    """Shared memory of one full stage: weights, scales and ``token_bytes`` of tokens."""
    rows = 2 * shape.tiles * 64
    return rows * shape.stage_k // 2 + rows * (shape.stage_k // group) * 2 + token_bytes


def tile_tokens(mean: float) -> int:
    """Columns per tile: wide enough that few experts need a second tile, which reads weights again.

    With routing spread evenly the tokens of an expert are about Poisson; at the thresholds about
    one expert in fifty overflows.

    Args:
        mean: tokens of an expert.
    """
    for size, most in zip(TILE_TOKENS[:-1], (4.0, 9.0, 22.0), strict=True):
        if mean <= most:
            return size
    return TILE_TOKENS[-1]


def _small(layer: Layer, tokens: int, sms: int) -> Plan | None:
    columns = 8 if tokens <= 8 else 16
    pairs = tokens * layer.top_k
    up, down = layer.up, layer.down
    if tokens > 16 or layer.top_k > MAX_SMALL_TOP_K or down.stages_per_unit > 1:
        return None
    up_stage = stage_bytes(up, layer.group, 0)
    down_tokens = 2 * down.tiles * columns * down.stage_k
    down_stage = stage_bytes(down, layer.inner_group, down_tokens)
    # With 8 columns both kernels fit on an SM together, so that the second fills its ring while the
    # first runs. What is taken off is room for their static tables and the driver's 1 KB.
    down_ring = 4
    room = CTA_SHARED_BYTES - 4_096
    if columns == 8:
        room = SM_SHARED_BYTES - 12_288 - down_ring * (down_stage + BARRIER_BYTES)
    up_ring = min(6, (room - columns * layer.hidden) // (up_stage + BARRIER_BYTES))
    if up_ring < 3:
        return None
    slots = min(pairs, layer.experts)
    up_kernel = _matrix_kernel(layer, "small_up.cu", "w4a8_small_up", True, columns)
    down_kernel = _matrix_kernel(
        layer, "small_down.cu", "w4a8_small_down", False, columns, W4_TILES=down.tiles
    )
    return Plan(
        "small",
        (
            Launch(
                up_kernel,
                (sms, 1),
                THREADS,
                columns * layer.hidden + up_ring * (up_stage + BARRIER_BYTES),
                up_ring,
                columns,
            ),
            Launch(
                down_kernel,
                (layer.hidden // 64, 1),
                THREADS,
                down_ring * (down_stage + BARRIER_BYTES),
                down_ring,
                columns,
            ),
        ),
        slots,
    )


def _own_down(layer: Layer, tokens: int, columns: int, tiles: int) -> Launch | None:
    """The launch of own_down.cu, or None if it cannot hold the batch."""
    down, pairs = layer.down, tokens * layer.top_k
    if tokens > MAX_MEDIUM_TOKENS or pairs > MAX_MEDIUM_PAIRS or down.stages_per_unit > 1:
        return None
    # Its stages have one row tile of 64 for each of 2 · tiles token tiles.
    token_bytes = 2 * down.tiles * columns * down.stage_k
    stage = stage_bytes(down, layer.inner_group, token_bytes) + BARRIER_BYTES
    tables = 2 * tokens * 64 * 4 + pairs * 4 + tiles * (columns + 1) * 2
    ring = min(6, (CTA_SHARED_BYTES - 1024 - tables) // stage)
    if ring < 3:
        return None
    kernel = _matrix_kernel(
        layer, "own_down.cu", "w4a8_own_down", False, columns, W4_TILES=down.tiles
    )
    return Launch(kernel, (layer.hidden // 64, 1), THREADS, ring * stage + tables, ring, columns)


def default_limits(layer: Layer) -> Limits:
    """For a card or shape without a table; from measurements on an H100.

    ``small`` has eight columns in its matrix instructions. ``medium`` loses with less than 8 KB of
    w2 per row tile, where fewer and larger copies win. ``prefill`` is taken from 1024 tokens on, if
    experts have 32 each: where it was measured it wins from 3 to 30 an expert on.
    """
    medium = {1: MAX_MEDIUM_TOKENS, 2: 128}.get(layer.down.tiles, 0)
    return Limits(SMALL_TOKENS, medium, max(1024, 32 * layer.experts // layer.top_k) - 1)


def takes_prefill(layer: Layer, tokens: int, path: str | None = None) -> bool:
    """Whether a call is ``prefill``'s, which :func:`plan` does not plan.

    Args:
        layer: the sizes.
        tokens: M.
        path: forces one of :data:`PATHS`.
    """
    limits = layer.limits or default_limits(layer)
    beyond = tokens > max(limits) and path is None
    return path == "prefill" or beyond


def gemm_launches(layer: Layer, columns: int, sms: int, row_scales: bool = False) -> list[Launch]:
    """gemm.cu for gate and up, and for down.

    Args:
        layer: the sizes.
        columns: of a tile.
        sms: multiprocessors.
        row_scales: tokens of gate and up bring a scale per 128 columns.
    """
    # The register files hold two CTAs of the narrow kernels.
    per_sm = 2 if columns <= 16 else 1
    most = min(CTA_SHARED_BYTES, SM_SHARED_BYTES // per_sm - 1024) - STATIC_BYTES
    matrix = []
    for up in (True, False):
        shape = layer.up if up else layer.down
        token_bytes = columns * shape.stage_k
        scaled = {"W4_ROW_SCALES": 1} if up and row_scales else {}
        if scaled:
            spans = shape.stage_k // (64 if shape.stage_k % 128 else 128)
            token_bytes += -(-spans * columns * 4 // 128) * 128
        stage = stage_bytes(shape, layer.group if up else layer.inner_group, token_bytes)
        ring = min(5 if per_sm == 2 else 8, most // (stage + BARRIER_BYTES))
        kernel = _matrix_kernel(
            layer,
            "gemm.cu",
            "w4a8_gemm",
            up,
            columns,
            W4_UP=int(up),
            W4_TILES=shape.tiles,
            **scaled,
        )
        shared = ring * (stage + BARRIER_BYTES)
        matrix.append(Launch(kernel, (sms * per_sm, 1), THREADS, shared, ring, columns))
    return matrix


def combine_launch(layer: Layer, tokens: int) -> Launch:
    """combine.cu."""
    return Launch(COMBINE, (tokens, -(-layer.hidden // (COMBINE_THREADS * 8))), COMBINE_THREADS)


def _large(layer: Layer, tokens: int, sms: int, own_down: bool) -> Plan:
    """``medium`` if ``own_down`` is wanted and can hold the batch, else ``large``."""
    columns = tile_tokens(tokens * layer.top_k / layer.experts)
    matrix = gemm_launches(layer, columns, sms)
    pairs = tokens * layer.top_k
    tiles = min(pairs, layer.experts + pairs // columns)
    route = Launch(ROUTE, (tokens + 1, 1), ROUTE_THREADS)
    own = _own_down(layer, tokens, columns, tiles) if own_down else None
    if own is not None:
        return Plan("medium", (route, matrix[0], own), tiles)
    return Plan("large", (route, *matrix, combine_launch(layer, tokens)), tiles)


@lru_cache  # every layer of a forward pass asks for the same
def plan(layer: Layer, tokens: int, sms: int, path: str | None = None) -> Plan:
    """The launches for ``tokens`` tokens on a card with ``sms`` SMs.

    Args:
        layer: the sizes.
        tokens: M, at least 1.
        sms: multiprocessors.
        path: forces ``small`` or ``medium`` (where they can run the call) or ``large``; for tests
            and the bench. None: the first whose limit is not exceeded and that can run the call.
    """
    limits = layer.limits or default_limits(layer)
    small = None
    if path == "small" or (path is None and tokens <= limits.small):
        small = _small(layer, tokens, sms)
    own_down = path == "medium" or (path is None and tokens <= limits.medium)
    return small or _large(layer, tokens, sms, own_down)


def most_tokens(layer: Layer, sms: int) -> int:
    """The largest M of one call: :data:`COUNTERS` must be enough.

    The widest tiles have 64 tokens, and every expert may end with one that is not full; narrower
    ones are chosen only while there are fewer of them than experts. And the CTAs that sort for
    ``prefill`` wait for each other, so all must be resident, two to an SM.
    """
    from sglang_w4afp8.kernels.hopper.plan_prefill import most_prefill_tokens

    counted = (COUNTERS - 4 * sms - 2 * layer.experts) * TILE_TOKENS[-1]
    return min(counted // layer.top_k, most_prefill_tokens(layer, sms))


def kernels(layer: Layer, sms: int) -> tuple[Kernel, ...]:
    """Every kernel that some number of tokens needs, for building before a graph is captured."""
    found: dict[Kernel, None] = {}
    tokens = 1
    while tokens <= 1 << 20:
        for path in Limits._fields:
            for launch in plan(layer, tokens, sms, path).launches:
                found[launch.kernel] = None
        tokens *= 2
    if takes_prefill(layer, UNLIMITED):
        from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill

        for power in range(22):  # sizes of lists and clusters change between them
            for some in (1 << power, 3 << power):
                found |= {launch.kernel: None for launch in plan_prefill(layer, some, sms).launches}
    return tuple(found)


def run_start(total: int, cta: int, ctas: int) -> int:
    """First stage of a CTA's run, as ``run_start`` in units.cuh."""
    return total * cta // ctas


def owners(total: int, ctas: int, unit: int, stages_per_unit: int) -> tuple[int, int]:
    """First and last CTA that work on a unit, as in ``join_parts`` in units.cuh."""
    begin = unit * stages_per_unit
    return ((begin + 1) * ctas - 1) // total, ((begin + stages_per_unit) * ctas - 1) // total
