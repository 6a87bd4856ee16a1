"""The paths for few tokens without a GPU: whole layers, computed as the kernels' indices have it.

Bytes go from the stage order through a stage of shared memory to the rows and columns of a thread,
results from there to memory; addresses are the kernels' own (``tests/helpers/kernel_source.py``),
products and sums are taken in float64, without FP8. Hidden sizes down to 32, which only models for
tests have, next to an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_source import c_constants, c_find, c_locals, c_shape, c_value, decode_words

from sglang_w4afp8.kernels.hopper import plan
from sglang_w4afp8.kernels.hopper.layout import StageShape, pad_to_tiles, shuffle_in_place
from sglang_w4afp8.kernels.hopper.plan import Launch, Layer
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme

GEMM, SMALL_UP, SMALL_DOWN, OWN = "gemm.cu", "small_up.cu", "small_down.cu", "own_down.cu"
THREAD = torch.arange(128)
LANE = THREAD % 32
ROW = THREAD // 32 * 16 + LANE // 4  # of a row tile: a thread's first; the other is 8 below
Tile = tuple[int, list[int]]  # expert, pairs


class Projection:
    """One launch with its weights in stage order."""

    def __init__(
        self, launch: Launch, shape: StageShape, packed: torch.Tensor, scales: torch.Tensor
    ) -> None:
        self.source, self.shape = launch.kernel.source, shape
        self.w, self.scales = (t.contiguous().view(torch.uint8).flatten() for t in (packed, scales))
        d = dict(launch.kernel.defines)
        tiles = d.get("W4_TILES", 1)
        whole = self.source in (SMALL_DOWN, OWN) or tiles > 1
        self.S = c_shape(
            kK=d["W4_K"], kTiles=tiles, kTokens=launch.tokens, kGroup=d["W4_GROUP"],
            kMinusEight=d["W4_MINUS_EIGHT"], kRestart=whole,
        )  # fmt: skip
        assert self.S.kRestart or self.S.kTiles == 1, "static_assert"
        join = SimpleNamespace(stages_per_unit=shape.stages_per_unit)
        self.p = SimpleNamespace(
            rows=shape.rows, k=shape.k, blocks=shape.blocks, join=join, w=0, scales=0
        )
        self.c: dict[str, Any] = c_constants(self.source, d | {"S": self.S})
        self.c |= {"S": self.S, "p": self.p, "per_unit": shape.stages_per_unit}
        self.c |= {"stage": 0, "full": 0, "policy": 0}

    def locals(self, within: str, names: str, **scope: Any) -> dict[str, Any]:
        return c_locals(self.source, within, names, self.c | scope)

    def copy(self, memory: torch.Tensor, scope: dict[str, Any], within: str, first: str) -> None:
        """The two bulk copies of weights and scales; ``first`` is what the former ends with."""
        for data, marker in ((self.w, within), (self.scales, first)):
            text = c_find(self.source, (within, marker), "bulk_copy(")
            to, start, size, _, _ = c_value(text, scope)
            assert start % 16 == to % 16 == size % 16 == 0, "a bulk copy of 16 bytes each"
            assert start >= 0 and start + size <= len(data), "read outside the weights"
            assert (memory[to : to + size] == 0x77).all(), "copied to twice"
            memory[to : to + size] = data[start : start + size]

    def memory(self) -> torch.Tensor:
        return torch.full((self.c["kStageBytes"],), 0x77, dtype=torch.uint8)

    def sums(
        self, memory: torch.Tensor, within: str, group: int, tile: int, tokens: torch.Tensor
    ) -> torch.Tensor:
        """``stage_math``: a row tile of a warpgroup times ``(columns, kK)``, ``(64, columns)``."""
        S = self.S
        thread = {"thread": THREAD, "lane": LANE, "group": group}
        at = self.locals(within, "w_at s_at", **thread)
        total = torch.zeros(64, len(tokens), dtype=torch.float64)
        for index in range(S.kGroups):
            item = {**self.c, "w": at["w_at"], "s": at["s_at"], "tile": tile, "group": index}
            item["item"] = tile * S.kGroups + index
            text = c_find("tile_math.cuh", ("auto begin",), "start_group<S>(")
            _, item["w"], _, _ = c_value(text, item | {"part": 0, "b": 0, "b_step": 0})
            address = c_value(c_find("tile_math.cuh", ("auto begin",), "lds32("), item)
            pair = memory[address[:, None] + torch.arange(4)].view(torch.bfloat16).double()
            scale = torch.zeros(64, 1, dtype=torch.float64)
            scale[ROW, 0], scale[ROW + 8, 0] = pair.T
            size = 16 if S.kGroup >= 64 else 8
            codes = torch.full((64, S.kGroup), float("nan"), dtype=torch.float64)
            for h in range(max(1, S.kGroup // 64)):
                fetch = "lds128(" if size == 16 else "lds64("
                text = c_find("tile_math.cuh", ("void start_group",), fetch)
                address = c_value(text, item | {"h": h})
                words = memory[address[:, None] + torch.arange(size)].view(128, -1, 4)
                # PTX ISA, wgmma m64k32 with 8-bit types: registers of rows g and g + 8
                column = h * 64 + torch.arange(size // 4)[:, None] * 16 + torch.arange(4)
                column = column + (LANE % 4 * 4)[:, None, None]
                for row, values in zip((ROW, ROW + 8), decode_words(words), strict=True):
                    codes[row[:, None, None], column] = values.double()
            assert not codes.isnan().any()
            columns = slice(index * S.kGroup, (index + 1) * S.kGroup)
            total += codes @ tokens[:, columns].T * scale
        return total


def write(out: torch.Tensor, row: Any, column: torch.Tensor, values: torch.Tensor) -> None:
    """Every place once; the four lanes of a row have other columns and come together here."""
    first = LANE % 4 == 0
    assert out[row, column[first]].isnan().all(), "written twice"
    out[row, column[first]] = values[first]


def silu_mul(total: torch.Tensor) -> torch.Tensor:
    """``(128,)`` a thread, or ``(128, columns)``."""
    return torch.nn.functional.silu(total[ROW]) * total[ROW + 8]


def gemm_units(one: Projection, tiles: list[Tile], b: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """``gemm.cu``: tile, row tile and sums, ``(tiles of a warpgroup, 64, pairs)``, of each unit."""
    steps, kk = one.shape.stages_per_unit, one.S.kK
    work = SimpleNamespace(tile_expert=[expert for expert, _ in tiles])
    sizes = one.locals("void produce", "w_expert s_expert")
    for unit in range(len(tiles) * one.p.blocks):
        total: list[Any] = [[0.0] * one.S.kTiles, [0.0] * one.S.kTiles]
        for step in range(steps):
            names = "unit step tile block expert row_tiles wb sb before"
            scope = sizes | {"n": unit * steps + step, "work": work}
            scope = c_locals(GEMM, "auto copy_weights", names, scope)
            memory = one.memory()
            one.copy(memory, scope, "auto copy_weights", "wb, full, policy);")
            tokens = b[tiles[scope["tile"]][1], step * kk : (step + 1) * kk]
            for group, t in product(range(2), range(one.S.kTiles)):
                total[group][t] += one.sums(memory, "void consume", group, t, tokens)
        for group in range(2):
            scope["row_tile"] = one.locals("void consume", "tile row_tile", unit=unit, group=group)
            row_tile = scope["row_tile"]["row_tile"]
            if row_tile < one.shape.rows // 64:
                yield tiles[scope["tile"]], row_tile, torch.stack(total[group])


def gemm_up(one: Projection, tiles: list[Tile], x: torch.Tensor, top_k: int) -> torch.Tensor:
    """q, ``(pairs, inner)``."""
    q = torch.full((len(x) * top_k, one.shape.rows // 2), float("nan"), dtype=torch.float64)
    rows = x.repeat_interleave(top_k, 0)
    for (_, pairs), row_tile, total in gemm_units(one, tiles, rows):
        f = one.locals("void finish_up", "f", row_tile=row_tile, thread=THREAD)["f"]
        values = silu_mul(total[0])  # with W4_UP nothing but the first row tile is finished
        for column, pair in enumerate(pairs):
            write(q, pair, f, values[:, column])
    return q


def gemm_down(one: Projection, tiles: list[Tile], q: torch.Tensor) -> torch.Tensor:
    """y, ``(pairs, hidden)``."""
    y = torch.full((len(q), one.shape.rows), float("nan"), dtype=torch.float64)
    for (_, pairs), row_tile, total in gemm_units(one, tiles, q):
        row = one.locals("void finish_down", "row", row_tile=row_tile, thread=THREAD)["row"]
        for t, (column, pair) in product(range(one.S.kTiles), enumerate(pairs)):
            write(y, pair, row + 2 * t, total[t, ROW, column])
            write(y, pair, row + 2 * t + 1, total[t, ROW + 8, column])
    return y


def own_down(one: Projection, tiles: list[Tile], q: torch.Tensor, ctas: int) -> torch.Tensor:
    """y, ``(pairs, hidden)``; the kernel adds its rows up, token by token."""
    y = torch.full((len(q), one.shape.rows), float("nan"), dtype=torch.float64)
    per_stage, within = one.c["kStageTiles"], "void produce"
    for cta, n in product(range(ctas), range(-(-len(tiles) // one.c["kStageTiles"]))):
        one.c["blockIdx"] = SimpleNamespace(x=cta)
        sizes = one.locals(within, "w_expert s_expert w scales")
        here = tiles[n * per_stage : (n + 1) * per_stage]
        memory = one.memory()
        for lane, (expert, _) in enumerate(here):
            scope = sizes | {"lane": lane, "expert": expert}
            one.copy(memory, scope, "auto copy_weights", "S::kTileBytes, full, policy);")
        for group, i in product(range(2), range(one.S.kTiles)):
            tile = one.locals("w4a8_own_down > slot = 0;", "tile", n=n, group=group)["tile"] + i
            if tile >= len(tiles):
                continue
            total = one.sums(memory, "w4a8_own_down", group, i, q[tiles[tile][1]])
            scope = {"warp": THREAD // 32, "g": LANE // 4}
            row = one.locals("32 pairs of rows", "first row", **scope)["row"]
            for column, pair in enumerate(tiles[tile][1]):
                write(y, pair, row, total[ROW, column])
                write(y, pair, row + 1, total[ROW + 8, column])
    return y


def token_offset(t: int, i: torch.Tensor, width: int) -> torch.Tensor:
    text = c_find(SMALL_UP, ("u32 token_offset",), "return")
    found: torch.Tensor = c_value(text, {"t": t, "i": i, "width": width})
    return found


def operand(width: int, tokens: int) -> torch.Tensor:
    """Bytes of a token operand as the matrix unit reads them, ``(tokens, width)``.

    ``token_descriptor`` with ``width * 8`` (PTX ISA, K-major without swizzle): core matrices of
    eight tokens by 16 bytes, the next along K after 128 bytes, the next tokens after the stride.
    """
    t, i = torch.arange(tokens)[:, None], torch.arange(width)
    return t // 8 * (width * 8) + i // 16 * 128 + t % 8 * 16 + i % 16


def small_up(one: Projection, experts: list[int], x: torch.Tensor) -> torch.Tensor:
    """q as token operands, ``(slots, columns · inner)``."""
    steps, width, kk = one.shape.stages_per_unit, one.shape.rows // 2, one.S.kK
    q = torch.full((len(experts), one.S.kTokens * width), float("nan"), dtype=torch.float64)
    shared = torch.full((one.S.kTokens * one.shape.k,), float("nan"), dtype=torch.float64)
    for t, row in enumerate(x):
        shared[token_offset(t, torch.arange(one.shape.k), one.shape.k)] = row
    slots = SimpleNamespace(expert=experts)
    sizes = one.locals("void produce", "w_expert s_expert") | {"slots": slots}
    for unit in range(len(experts) * one.p.blocks):
        total: list[Any] = [0.0, 0.0]
        for step in range(steps):
            names = "unit step block expert row_tiles before wb sb"
            scope = c_locals(SMALL_UP, "void produce", names, sizes | {"n": unit * steps + step})
            memory = one.memory()
            one.copy(memory, scope, "void produce", "wb, full, policy);")
            text = c_find(SMALL_UP, ("barrier_wait(full, phase);\n      const",), "b")
            zero = {"smem_address": int, "tokens": 0, "step": step, "i": 0}
            first = c_value(text, one.c | zero)
            tokens = shared[first + operand(one.shape.k, len(x))[:, :kk]]
            for group in range(2):
                total[group] += one.sums(memory, "w4a8_small_up", group, 0, tokens)
        for group in range(2):
            row_tile = one.locals("w4a8_small_up", "row_tile", unit=unit, group=group)["row_tile"]
            if row_tile < one.shape.rows // 64:
                f = one.locals("finish_up", "f", row_tile=row_tile, thread=THREAD, g=LANE // 4)["f"]
                for t, values in enumerate(silu_mul(total[group]).T):
                    write(q, unit // one.p.blocks, token_offset(t, f, width), values)
    return q


def small_down(
    one: Projection, experts: list[int], q: torch.Tensor, share: torch.Tensor, ctas: int
) -> torch.Tensor:
    """The output, ``(tokens, hidden)``; ``share`` ``(slots, tokens)``: combine weights."""
    out = torch.full((share.shape[1], one.shape.rows), float("nan"), dtype=torch.float64)
    per_stage, within = one.c["kStageSlots"], "auto copy"
    for cta in range(ctas):
        total = torch.zeros(64, share.shape[1], dtype=torch.float64)
        for n in range(-(-len(experts) // per_stage)):
            memory = one.memory()
            for lane, expert in enumerate(experts[n * per_stage : (n + 1) * per_stage]):
                scope = {"lane": lane, "expert": expert, "row_tile": cta}
                scope = one.locals("w4a8_small_down", "w_expert s_expert", **scope)
                one.copy(memory, scope, within, "S::kTileBytes, full, policy);")
            for group, i in product(range(2), range(one.S.kTiles)):
                slot = one.locals("w4a8_small_down", "slot0", n=n, group=group)["slot0"] + i
                if slot < len(experts):
                    assert q.shape[1] == one.c["kTokenBytes"]
                    tokens = q[slot][operand(one.S.kK, len(share.T))]
                    part = one.sums(memory, "w4a8_small_down", group, i, tokens)
                    total += part * share[slot]
        scope = {"thread": THREAD, "lane": LANE, "row_tile": cta}
        row = one.locals("if (group == 0)", "in_group row", **scope)["row"]
        for t in range(len(out)):
            write(out, t, row, total[ROW, t])
            write(out, t, row + 1, total[ROW + 8, t])
    return out


def run(layer: Layer, ready: MoEWeights, x: torch.Tensor, route: torch.Tensor,
        ids: torch.Tensor, path: str) -> torch.Tensor:  # fmt: skip
    """The output of a path's kernels, ``(M, hidden)`` float64."""
    chosen = plan.plan(layer, len(x), 132, path)
    assert chosen.path == path
    launches = [one for one in chosen.launches if one.ring]
    up = Projection(launches[0], layer.up, ready.w13, ready.w13_scale)
    down = Projection(launches[1], layer.down, ready.w2, ready.w2_scale)
    ctas = launches[1].grid[0]
    pairs = {e: (ids.flatten() == e).nonzero().flatten().tolist() for e in range(layer.experts)}
    if path == "small":
        experts = [e for e, mine in pairs.items() if mine]
        share = torch.stack([((ids == e) * route.double()).sum(1) for e in experts])
        return small_down(down, experts, small_up(up, experts, x), share, ctas)
    width = launches[0].tokens
    tiles = [(e, p[i : i + width]) for e, p in pairs.items() for i in range(0, len(p), width)]
    q = gemm_up(up, tiles, x, layer.top_k)
    y = own_down(down, tiles, q, ctas) if path == "medium" else gemm_down(down, tiles, q)
    return (y.view(len(x), layer.top_k, -1) * route.double()[..., None]).sum(1)


SIZES = [
    # hidden, inner, group, group of w2
    (32, 64, 32, 32),
    (64, 32, 64, 32),
    (64, 128, 32, 128),
    (64, 192, 64, 64),
    (64, 512, 64, 128),
    (96, 256, 32, 128),
    (128, 64, 128, 64),
    (128, 128, 64, 32),
    (128, 320, 128, 64),
    (448, 64, 64, 64),  # 7 row tiles of w2
]


@pytest.mark.parametrize(("hidden", "inner", "group", "w2_group"), SIZES)
@pytest.mark.parametrize(
    ("path", "tokens"), [("small", 5), ("small", 13), ("medium", 11), ("large", 11)]
)
def test_a_layer_of_every_path(
    hidden: int, inner: int, group: int, w2_group: int, path: str, tokens: int
) -> None:
    assert plan.why_not(hidden, inner, 4, group, w2_group) is None
    g = torch.Generator().manual_seed(hidden + inner)

    def codes(rows: int, k: int) -> torch.Tensor:
        return pack_int4(torch.randint(-8, 8, (4, rows, k), generator=g))

    weights = MoEWeights(
        codes(2 * inner, hidden),
        (torch.rand(4, 2 * inner, hidden // group, generator=g) / 16).bfloat16(),
        codes(hidden, inner),
        torch.rand(4, hidden, inner // w2_group, generator=g).bfloat16(),
        group,
        w2_group,
    )
    top_k = 2
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    ids = torch.rand(tokens, 3, generator=g).topk(top_k, dim=1).indices  # nobody wants the last
    route = torch.rand(tokens, top_k, generator=g)
    wanted = moe_reference(x, weights, route, ids, scheme=ActivationScheme.NONE)

    filled = pad_to_tiles(weights)
    ready = filled.replaced(
        **{name: getattr(filled, name).clone() for name in ("w13", "w13_scale", "w2", "w2_scale")}
    )
    shuffle_in_place(ready.w13, ready.w13_scale, True, True)
    shuffle_in_place(ready.w2, ready.w2_scale, False, True)
    wide, full = filled.hidden_size, filled.w2.shape[2] * 2
    layer = Layer(4, wide, full, group, w2_group, top_k, True, False)
    if path != "large" and layer.down.stages_per_unit > 1:
        assert plan.plan(layer, tokens, 132, path).path == "large"
        path = "large"
    wide_x = torch.nn.functional.pad(x, (0, wide - hidden))
    found = run(layer, ready, wide_x, route, ids, path)
    assert not found.isnan().any(), "not written"
    torch.testing.assert_close(found[:, :hidden], wanted, rtol=1e-9, atol=1e-9)
    assert not found[:, hidden:].any()


@pytest.mark.parametrize("source", [GEMM, OWN])
@pytest.mark.parametrize(("k", "tiles"), [(64, 1), (64, 2), (128, 1), (128, 2), (192, 1), (256, 1)])
@pytest.mark.parametrize("width", plan.TILE_TOKENS)
def test_tokens_lie_where_the_matrix_unit_reads(
    source: str, k: int, tiles: int, width: int
) -> None:
    """``produce``'s 16-byte copies against the operand of the descriptor; all of a stage."""
    S = c_shape(kK=k, kTiles=tiles, kTokens=width, kGroup=64, kMinusEight=0, kRestart=1)
    c: dict[str, Any] = {"S": S, "ring": 0, "slot": 0, "p": SimpleNamespace(b=0), "step": 0}
    defines = {"W4_UP": 0, "W4_K": k, "W4_TILES": tiles, "W4_TOKENS": width, "W4_GROUP": 64}
    c |= c_constants(source, defines | {"S": S})
    operands = c["kStageTiles"] if source == OWN else 1
    shared: dict[int, tuple[int, int]] = {}
    for lane in range(32):
        dst = c_locals(source, "void produce", "dst", c | {"lane": lane})["dst"]
        for j, i in product(range(operands * width // 8), range(k // 64)):
            token = j * 8 + lane % 8
            scope = {**c, "dst": dst, "j": j, "i": i, "lane": lane}
            if source == OWN:
                scope |= {"pair": token}
                scope = c_locals(OWN, "void produce", "row", scope)
            else:
                columns = c_value(c_find(GEMM, ("void produce",), "pair"), scope | {
                    "tile": 0, "p": SimpleNamespace(columns=range(width))})  # fmt: skip
                assert columns == token
                scope["row"] = [token * k + lane // 8 * 16] * (j + 1)
            to, start = c_value(c_find(source, ("void produce",), "async_copy16("), scope)
            assert to not in shared and to % 16 == start % 16 == 0
            shared[to] = divmod(start, k)
    first = c["kWeightBytes"] + c["kScaleBytes"]
    assert sorted(shared) == list(range(first, first + operands * width * k, 16))
    for number in range(operands):
        where = first + number * width * k + operand(k, width)
        for t, column in product(range(width), range(0, k, 16)):
            assert shared[int(where[t, column])] == (number * width + t, column)
