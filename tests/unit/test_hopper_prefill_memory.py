"""The prefill path without a GPU: what its kernels put where in shared memory.

Constants and index expressions are the kernels' own (``tests/helpers/kernel_source.py``). What they
are held against: the order of the module ``layout``, and wgmma's operands as the PTX ISA has them.
"""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_route import CUT
from hopper_stages import stage_copies
from kernel_source import c_constants, c_find, c_locals, c_text, c_value, decode_words

from sglang_w4afp8.kernels.hopper.layout import StageShape, _row_order, shuffle_in_place
from sglang_w4afp8.kernels.hopper.plan_prefill import SORTED_TOKENS
from sglang_w4afp8.packing import pack_int4

COMMON, PRODUCE, RING = "prefill.cuh", "prefill_produce.cuh", "prefill_ring.cuh"
UP, DOWN = "prefill_up.cu", "prefill_down.cu"
# Row tiles of a warpgroup in an item, and whether tokens are in the order of the list.
TWO, ONE, LISTED = (2, 0), (1, 0), (1, 1)
SHAPES = [
    # rows, K, group, gate and up
    (512, 512, 128, True, TWO),
    (896, 256, 32, True, TWO),  # 14 row tiles: two in the last block
    (192, 384, 64, True, ONE),
    (128, 256, 128, True, ONE),
    (1344, 192, 32, True, TWO),  # 21 row tiles
    # Tokens in the order of the list
    (1024, 512, 128, True, LISTED),  # stages of the layout are cut
    (640, 256, 32, True, LISTED),  # ten row tiles: one in the last block
    (704, 192, 64, True, LISTED),
    (896, 128, 128, True, LISTED),
    (640, 384, 128, False, LISTED),
    (640, 256, 128, False, LISTED),
    (704, 512, 64, False, LISTED),  # 11 row tiles
    (512, 512, 32, False, LISTED),
    (320, 320, 64, False, LISTED),
    (448, 448, 32, False, LISTED),
    # Hidden sizes of models for tests: K of gate and up, rows of down.
    (512, 64, 64, True, TWO),
    (128, 64, 32, True, ONE),
    (896, 128, 128, True, TWO),
    (640, 128, 32, True, ONE),
    (640, 64, 32, True, LISTED),
    (640, 128, 32, True, LISTED),
    (64, 512, 64, False, LISTED),
    (64, 320, 32, False, LISTED),
    (128, 512, 128, False, LISTED),
    (192, 320, 64, False, LISTED),
]


def constants(
    rows: int,
    k: int,
    group: int,
    cut: tuple[int, int] = TWO,
    cluster: int = 1,
    gate_up: bool = True,
) -> dict[str, Any]:
    shape = StageShape.of(rows, k, group, gate_up)
    defines = {"W4_K": shape.stage_k, "W4_TILES": shape.tiles, "W4_GROUP": group}
    defines |= {
        "W4_MINUS_EIGHT": 1,
        "W4_PER_WG": cut[0],
        "W4_DYNAMIC": 0,
        "W4_SORTED": cut[1],
    }
    more = {"W4_PANEL": 0} if gate_up else {"W4_PARTS": 8}
    return c_constants(UP if gate_up else DOWN, defines | more | {"W4_CLUSTER": cluster})


def stages(
    c: dict[str, Any], w: torch.Tensor, s: torch.Tensor, block: int, cta: int = 0
) -> list[torch.Tensor]:
    """Shared memory after a stage's copies; 0x77 where none came.

    ``produce_weights`` of a CTA, or with tokens in the order of the list ``produce_stages``.
    """
    experts, rows, k = w.shape[0], w.shape[1], w.shape[2] * 2
    flat = {0: w.view(torch.uint8).flatten(), 1: s.view(torch.uint8).flatten()}
    item = SimpleNamespace(block=block, expert=experts - 1, first=0, count=16)
    if c["kSorted"]:
        found = []
        for stage in stage_copies(c, item, k, rows, 16, "kAdders" in c):
            found.append(torch.full((c["kStageBytes"],), 0x77, dtype=torch.uint8))
            for one in (one for one in stage if one.what != "tokens"):
                there = found[-1][one.to : one.to + one.size]
                assert (there == 0x77).all(), "copied to twice"
                there.copy_(flat[int(one.what == "scales")][one.source :][: one.size])
        return found
    p = SimpleNamespace(rows=rows, k=k, w=0, scales=0)
    fixed: dict[str, Any] = {**c, "p": p, "item": item, "blockIdx": SimpleNamespace(x=cta)}
    fixed |= {"ring": SimpleNamespace(stage=lambda slot: 0), "place": SimpleNamespace(slot=0)}
    within, names = "void produce_weights", "lane tiles stages kBlockTiles kTogether kCopies mine "
    names += "is_scale first row_bytes tile_bytes to row_tiles tile block beside count from"
    size = c["kStageBytes"]
    found = [torch.full((size,), 0x77, dtype=torch.uint8) for _ in range(k // c["kStageK"])]
    for lane in range(32):
        scope = c_locals(PRODUCE, within, names, fixed | {"threadIdx": SimpleNamespace(x=lane)})
        for stage in found:
            to, at, size = scope["to"], scope["from"], scope["count"] * scope["tile_bytes"]
            if size > 0:
                assert (stage[to : to + size] == 0x77).all(), "copied to twice"
                stage[to : to + size] = flat[int(scope["is_scale"])][at : at + size]
            scope["from"] += c_value(c_find(PRODUCE, (within,), "from +="), scope)
    return found


def fragment(c: dict[str, Any], scope: dict[str, Any], tile: int, half: int) -> dict[str, Any]:
    """What ``load_codes`` is given for a row tile of a warpgroup: ``w`` and ``s``."""
    thread = scope["wg"] * 128 + scope["thread"]
    at = c_locals(COMMON, "static Mine here()", "thread before", scope | {
        "read_thread": lambda: thread
    })  # fmt: skip
    text = c_find(COMMON, ("static Mine here()",), "return").replace("Mine{", "(")
    w, s, lane = c_value(text.replace("}", ")"), at)
    assert (lane == thread % 32).all()
    here = scope | {"next_half": half, "mine": SimpleNamespace(codes=w, scales=s)}
    w, s = (c_value(c_find(COMMON, ("void multiply(",), name), here) for name in ("w", "s"))
    found = scope | {"w": w, "s": s, "tile": tile, "group": 0}
    more = c_value(c_find(COMMON, ("void load_codes",), "w +="), found)
    return found | {"w": w + more}


@pytest.mark.parametrize(("rows", "k", "group", "gate_up", "cut"), SHAPES)
def test_fragments_are_the_rows_of_the_item(
    rows: int, k: int, group: int, gate_up: bool, cut: tuple[int, int]
) -> None:
    """``load_codes``, for every thread and scale group, on what was copied."""
    generator = torch.Generator().manual_seed(rows + k)
    codes = torch.randint(-8, 8, (3, rows, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(3, rows, k // group, generator=generator).bfloat16()
    packed, wanted = pack_int4(codes), scales.clone()
    shuffle_in_place(packed, scales, gate_up, True)
    c = constants(rows, k, group, cut, gate_up=gate_up)
    order = _row_order(rows, gate_up, c["kLayoutTiles"]).view(-1, 4, 8, 2)
    thread = torch.arange(128)
    warp, g, q = thread // 32, thread % 32 // 4, thread % 4
    seen = torch.zeros(rows, k, dtype=torch.int32)
    for block in range(-(-rows // 64 // c["kRowTiles"])):
        for step, shared in enumerate(stages(c, packed, scales, block)):
            for wg, half, tile in product(range(2), range(c["kHalves"]), range(cut[0])):
                row_tile = block * c["kRowTiles"] + wg * cut[0] + tile
                if row_tile * 64 >= rows:
                    continue
                at = {**c, "thread": thread, "lane": thread % 32, "wg": wg, "stage": 0}
                fixed = fragment(c, at, tile, half)
                rows_of = order[row_tile, warp, g]  # (128, 2)
                for part in range(c["kGroups"]):
                    scope = fixed | {"group": part}
                    first = step * c["kStageK"] + half * c["kK"] + part * group
                    fetch = "lds128(" if group >= 64 else "lds64("
                    for h in range(max(1, group // 64)):
                        text = c_find(COMMON, ("void load_codes",), fetch)
                        address = c_value(text, scope | {"h": h})
                        size = 16 if group >= 64 else 8
                        words = shared[address[:, None] + torch.arange(size)].view(128, -1, 4)
                        column = first + h * 64 + torch.arange(size // 4) * 16
                        column = column + q[:, None] * 4
                        column = column[:, :, None] + torch.arange(4)
                        for row, values in zip(rows_of.T, decode_words(words), strict=True):
                            assert torch.equal(values, codes[2, row[:, None, None], column].int())
                            seen[row[:, None, None], column] += 1
                    address = c_value(c_find(COMMON, ("void load_codes",), "lds32("), scope)
                    found = shared[address[:, None] + torch.arange(4)].contiguous()
                    assert torch.equal(
                        found.view(torch.bfloat16), wanted[2, rows_of, first // group]
                    )
    assert (seen == 1).all()


@pytest.mark.parametrize(("rows", "k", "group"), [(512, 512, 128), (768, 192, 32), (256, 64, 64)])
def test_ctas_of_a_cluster_copy_half_of_a_stage_each(rows: int, k: int, group: int) -> None:
    codes = torch.zeros(2, rows, k // 2, dtype=torch.uint8)
    scales = torch.zeros(2, rows, k // group, dtype=torch.bfloat16)
    alone = constants(rows, k, group)
    c = constants(rows, k, group, cluster=2)
    arrivals = c_find(RING, ("ring.tokens_full(i, h), kTokenArrivals",), "barrier_init(")
    ring = SimpleNamespace(empty=lambda i: i)
    # A lane of each consumer warp for each CTA
    assert c_value(arrivals, c | {"i": 0, "ring": ring})[1] == 2 * 256 // 32
    assert c_value(arrivals, alone | {"i": 0, "ring": ring})[1] == 256 // 32
    expected = c["kRowTiles"] * (c["kTileBytes"] + c["kTileScaleBytes"])
    for block in range(rows // 256):
        wanted = stages(alone, codes, scales, block)
        halves = [stages(c, codes, scales, block, 2 * 3 + rank) for rank in range(2)]
        for whole, one, other in zip(wanted, *halves, strict=True):
            written = [stage != 0x77 for stage in (whole, one, other)]
            assert torch.equal(written[1] ^ written[2], written[0])
            assert [int(mask.sum()) for mask in written] == [expected, *[expected // 2] * 2]


def produced_tokens(c: dict[str, Any], k: int, stage: int) -> list[dict[int, tuple[int, int, int]]]:
    """``produce_tokens``: (token, first column) of 16 bytes, by address, for each stage along K."""
    shared: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(k // c["kStageK"])]
    within, function = "void produce_tokens", ("void produce_tokens",)
    for part, lane in product(range(2), range(32)):
        scope: dict[str, Any] = {**c, "part": part, "threadIdx": SimpleNamespace(x=lane)}
        scope |= {"k": k, "b": 0, "row": int, "list": range(c["kTokens"])}
        scope |= {"item": SimpleNamespace(count=c["kTokens"])}
        s = c_locals(PRODUCE, within, "lane kMine piece first swizzled to_lane at", scope)
        rows = []
        for j in range(s["kMine"]):
            row = c_locals(PRODUCE, within, "c", s | {"j": j})
            rows.append(c_value(c_find(PRODUCE, function, "from[j]"), row))
        for found in shared:
            to, address = stage + s["to_lane"], 0
            for _ in range(c["kHalves"] * (c["kK"] // c["kPanel"])):
                for j in range(s["kMine"]):
                    copy = c_find(PRODUCE, function, "async_copy16(")
                    address, source = c_value(copy, s | {"j": j, "to": to, "from": rows})
                    assert address not in found and address % 16 == 0
                    found[address] = divmod(source, k)
                to += c_value(c_find(PRODUCE, function, "to +="), s)
                s["at"] += c_value(c_find(PRODUCE, function, "at +="), s)
    return shared


def operand(c: dict[str, Any], stage: int, half: int) -> list[list[int]]:
    """Where the matrix unit reads 16 bytes of a stage's half: of columns of K, for each token."""
    found: list[list[int]] = [[] for _ in range(c["kTokens"])]
    scope = {**c, "stage": stage, "half": half}
    scope["address"] = c_value(c_find(COMMON, ("void multiply(",), "panel_descriptor("), scope)
    scope = c_locals(COMMON, "u64 panel_descriptor", "kSwizzle", scope)
    begin = c_value(c_find(COMMON, ("u64 panel_descriptor",), "return"), scope)
    number = c_find(COMMON, ("void issue(", "Mma<"), "column_step(").split(")")[0]
    for group, j in product(range(c["kGroups"]), range(c["kSteps"])):
        step = {**c, "j": c_value(number, {**c, "group": group, "j": j})}
        descriptor = begin + c_value(c_find(COMMON, ("u64 column_step",), "return"), step)
        # PTX ISA: bits 0-13 address, 32-45 stride of eight rows, 62-63 swizzle of 128 or 64
        # bytes: address bits 7-9 or 7-8 are added to bits 4-6 or 4-5.
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        row_bytes, bits = {1: (128, 7), 2: (64, 3)}[descriptor >> 62]
        for token, piece in product(range(c["kTokens"]), range(2)):
            address = start + token // 8 * stride + token % 8 * row_bytes + piece * 16
            found[token].append(address ^ (address >> 7 & bits) << 4)
    return found


def matrix_widths() -> dict[int, tuple[int, ...]]:
    """Tokens of an instruction of the matrix unit: its accumulators, and its other operands."""
    found: dict[int, tuple[int, ...]] = {}
    for line in re.findall(r"^W4_MMA\((.*)\);", c_text("mma_wide.cuh"), re.M):
        width, *numbers = map(int, line.split(", "))
        assert width not in found
        found[width] = tuple(numbers)
    return found


def test_operands_of_the_matrix_unit_are_numbered_one_after_the_other() -> None:
    text = c_text("mma.cuh")
    macros = dict(re.findall(r"^#define W4_((?:TEXT|SUMS)_\d+) (.*)$", text, re.M))

    def expanded(name: str) -> str:
        """Each macro is the one before, and four more."""
        before = re.match(r"W4_((?:TEXT|SUMS)_\d+),? ", macros[name])
        return (
            macros[name] if before is None else expanded(before[1]) + macros[name][before.end() :]
        )

    for width, (sums, *others) in matrix_widths().items():
        assert width % 8 == 0 and sums == width // 2 and others == [sums + i for i in range(6)]
        quoted = expanded(f"TEXT_{sums}").replace('""', "")
        assert quoted == '"' + ", ".join(f"%{i}" for i in range(sums)) + '"'
        fours = expanded(f"SUMS_{sums}").replace(")W4", "), W4")
        assert fours == ", ".join(f"W4_FOUR({i})" for i in range(0, sums, 4))
    four = ", ".join(f'"+f"(d[i{f" + {j}" if j else ""}])' for j in range(4))
    assert f"#define W4_FOUR(i) {four}\n" in text


def test_a_tile_is_multiplied_with_the_fewest_columns() -> None:
    """``with_columns``: in the order of the list there are tiles of more than 128 tokens."""
    text = c_text(COMMON)
    text = text[text.index("void with_columns(") :]
    listed, wide, narrow = re.split(r"\n  switch \(.*\) {", text)
    assert "if constexpr (kSorted) {\n    switch (eights) {" in listed
    case = r"(?:case (\d+)|default): return body.template run<(\d+)>"
    found: dict[int, int] = {}  # columns, by how many times eight
    for eights, columns in re.findall(case, listed + wide):
        assert int(eights) not in found
        found[int(eights)] = int(columns)
    for sixteens, columns in re.findall(case, narrow):
        for eights in (2 * int(sixteens or 6) - 1, 2 * int(sixteens or 6)):
            found.setdefault(eights, int(columns))
    assert {*found} == {*range(1, SORTED_TOKENS // 8 + 1)}
    scope = {"lists": SimpleNamespace(together=1, tile_tokens=SORTED_TOKENS)}
    for count in range(1, SORTED_TOKENS + 1):
        eights = c_value(
            c_find(COMMON, ("void with_columns(",), "eights"), {"count": count, "uniform": int}
        )
        size = c_locals("prefill_sort.cuh", "least", CUT, scope | {"tokens": count})["size"]
        assert found[eights] == size and count <= size < count + (8 if count > 96 else 16)
    assert {*found.values()} <= {*matrix_widths()}


@pytest.mark.parametrize("cut", [TWO, LISTED])
@pytest.mark.parametrize("k", [64, 128, 192, 256, 320, 512])
def test_panels_are_swizzled_as_wgmma_reads_them(k: int, cut: tuple[int, int]) -> None:
    """``produce_tokens`` against ``panel_descriptor`` and ``column_step``."""
    c, stage = constants(128, k, 64, cut), 5 * 1024
    for step, shared in enumerate(produced_tokens(c, k, stage)):
        assert sorted(shared) == list(range(stage, stage + c["kHalves"] * c["kTokenBytes"], 16))
        for half in range(c["kHalves"]):
            first = step * c["kStageK"] + half * c["kK"]
            for token, addresses in enumerate(operand(c, stage, half)):
                columns = [(token, first + 16 * i) for i in range(c["kK"] // 16)]
                assert [shared[address] for address in addresses] == columns


@pytest.mark.parametrize(("k", "group"), [(320, 64), (384, 32), (512, 128), (640, 128), (576, 64)])
def test_q_is_read_in_the_order_of_the_list(k: int, group: int) -> None:
    """What gate and up write, through down's copies, to where the matrix unit wants it."""
    c, stage, b_rows = constants(64, k, group, LISTED, gate_up=False), 5 * 1024, 1000
    up = constants(2 * k, 512, group, LISTED) | {"kOutPanel": c["kPanel"], "kColumns": c["kPanel"]}
    # Tiles of an expert begin at any row; the next ones a multiple of 8 rows behind.
    for first, before, count in ((0, 0, 192), (37, 0, 48), (37, 152, 133), (901, 96, 3)):
        q, p = {}, SimpleNamespace(q=0, q_rows=b_rows, rows=None)
        for column, feature in product(range(count), range(0, k, 16)):
            scope = up | {"p": p, "c": column, "row": first + before + column, "kSorted": 1}
            scope["row"] = c_value(c_find(UP, ("int row_of(",), "return"), scope)
            scope = c_locals(UP, "u8* q_piece", "number key at", scope | {"column": feature})
            address = c_value(c_find(UP, ("u8* q_piece", "u64 at"), "return"), scope)
            assert address not in q and 0 <= address <= b_rows * k - 16
            q[address] = column, feature
        shared: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(k // c["kStageK"])]
        item = SimpleNamespace(first=first + before, count=count, block=0, expert=0)
        for memory, copies in zip(shared, stage_copies(c, item, k, 64, b_rows), strict=True):
            for one in (one for one in copies if one.what == "tokens"):
                assert not any(stage + one.to + i in memory for i in range(0, one.size, 16))
                memory |= {stage + one.to + i: q[one.source + i] for i in range(0, one.size, 16)}
        for step, memory in enumerate(shared):
            assert len(memory) * 16 == count * c["kStageK"], "what the barrier expects"
            for token, addresses in enumerate(operand(c, stage, 0)[:count]):
                columns = [(token, step * c["kStageK"] + 16 * i) for i in range(c["kK"] // 16)]
                assert [memory[address] for address in addresses] == columns


def test_gate_and_up_end_as_the_feature_of_their_rows() -> None:
    for rows, k, cut in (
        (512, 256, TWO),
        (384, 256, ONE),
        (896, 256, TWO),
        (128, 64, ONE),
        (512, 64, TWO),
        (640, 256, LISTED),
        (1024, 128, LISTED),
        (1152, 192, LISTED),
    ):
        c = constants(rows, k, 64, cut)
        order = _row_order(rows, True, 1).view(-1, 4, 8, 2)
        features = []
        for block, wg in product(range(-(-rows // 64 // c["kRowTiles"])), range(2)):
            item = SimpleNamespace(block=block)
            p = SimpleNamespace(weights=SimpleNamespace(rows=rows))
            scope = {**c, "item": lambda item=item: item, "p": p, "wg": wg}
            s = c_locals(UP, "void run()", "row_tile tiles", scope)
            gathered = {}
            for thread, t in product(range(128), range(cut[0])):
                f = c_locals(UP, "void run()", "f", {"thread": thread, "lane": thread % 32})["f"]
                assert c["kPitch"] >= c["kFeatures"] > t * 32 + f
                gathered[t * 32 + f] = s["row_tile"] + t, thread // 32, thread % 32 // 4
            for piece in range(c["kFeatures"] // 16):
                if piece * 16 < s["tiles"] * 32:
                    for byte in range(16):
                        tile, warp, g = gathered[piece * 16 + byte]
                        at = s["row_tile"] * 32 + piece * 16 + byte
                        assert order[tile, warp, g].tolist() == [at, at + rows // 2]
                        features.append(at)
        assert sorted(features) == list(range(rows // 2))
