"""The prefill path without a GPU: what its kernels put where in shared memory and in y.

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
from kernel_source import c_constants, c_find, c_locals, c_text, c_value, decode_words

from sglang_w4afp8.kernels.hopper.layout import StageShape, _row_order, shuffle_in_place
from sglang_w4afp8.packing import pack_int4

COMMON, RING = "prefill.cuh", "prefill_ring.cuh"
UP, DOWN = "prefill_up.cu", "prefill_down.cu"
SHAPES = [
    # rows, K, group, gate and up, row tiles of a warpgroup in an item
    (512, 512, 128, True, 2),
    (896, 256, 32, True, 2),  # 14 row tiles: two in the last block
    (192, 384, 64, True, 1),
    (128, 256, 128, True, 1),
    (1344, 192, 32, True, 2),  # 21 row tiles
    (640, 256, 128, False, 2),
    (704, 512, 64, False, 2),  # 11 row tiles
    (640, 128, 128, False, 2),
    (896, 128, 32, False, 2),
    (768, 64, 64, False, 2),
    (512, 64, 32, False, 2),
    (320, 192, 64, False, 2),
    (448, 384, 128, False, 2),
    # Hidden sizes of models for tests: K of gate and up, rows of down.
    (512, 64, 64, True, 2),
    (128, 64, 32, True, 1),
    (896, 128, 128, True, 2),
    (640, 128, 32, True, 1),
    (64, 256, 128, False, 2),
    (64, 64, 32, False, 2),
    (64, 512, 64, False, 2),
    (128, 128, 128, False, 2),
    (128, 64, 64, False, 2),
    (128, 192, 64, False, 2),
]


def constants(
    source: str, rows: int, k: int, group: int, per_wg: int = 2, cluster: int = 1
) -> dict[str, Any]:
    shape = StageShape.of(rows, k, group, source == UP)
    defines = {"W4_K": shape.stage_k, "W4_TILES": shape.tiles, "W4_GROUP": group}
    more = {"W4_MINUS_EIGHT": 1, "W4_PER_WG": per_wg, "W4_DYNAMIC": 0, "W4_CLUSTER": cluster}
    return c_constants(source, defines | more | {"W4_PANEL": 0})


def stages(
    c: dict[str, Any], w: torch.Tensor, s: torch.Tensor, block: int, cta: int = 0
) -> list[torch.Tensor]:
    """``produce_weights`` of a CTA: shared memory after a stage's copies; 0x77 where none came."""
    experts, rows, k = w.shape[0], w.shape[1], w.shape[2] * 2
    flat = {0: w.view(torch.uint8).flatten(), 1: s.view(torch.uint8).flatten()}
    item = SimpleNamespace(block=block, expert=experts - 1)
    p = SimpleNamespace(rows=rows, k=k, w=0, scales=0)
    found = []
    for lane in range(32):
        scope: dict[str, Any] = {**c, "p": p, "item": item, "threadIdx": SimpleNamespace(x=lane)}
        scope["blockIdx"] = SimpleNamespace(x=cta)
        names = "lane tiles stages kBlockTiles kTogether kCopies mine is_scale first row_bytes"
        names += " tile_bytes to row_tiles tile block beside count from"
        scope = c_locals(COMMON, "void produce_weights", names, scope)
        at, count = scope["from"], scope["count"]
        for step in range(scope["stages"]):
            if lane == 0:
                found.append(torch.full((c["kStageBytes"],), 0x77, dtype=torch.uint8))
            if count > 0:
                size = count * scope["tile_bytes"]
                target = found[step][scope["to"] : scope["to"] + size]
                assert (target == 0x77).all(), "copied to twice"
                target[:] = flat[int(scope["is_scale"])][at : at + size]
            at += c_value(c_find(COMMON, ("void produce_weights",), "from +="), scope)
    return found


@pytest.mark.parametrize(("rows", "k", "group", "gate_up", "per_wg"), SHAPES)
def test_fragments_are_the_rows_of_the_item(
    rows: int, k: int, group: int, gate_up: bool, per_wg: int
) -> None:
    """``load_fragment``, for every thread and scale group, on what ``produce_weights`` copied."""
    generator = torch.Generator().manual_seed(rows + k)
    codes = torch.randint(-8, 8, (3, rows, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(3, rows, k // group, generator=generator).bfloat16()
    packed, wanted = pack_int4(codes), scales.clone()
    shuffle_in_place(packed, scales, gate_up, True)
    c = constants(UP if gate_up else DOWN, rows, k, group, per_wg)
    order = _row_order(rows, gate_up, c["kLayoutTiles"]).view(-1, 4, 8, 2)
    thread = torch.arange(128)
    warp, g, q = thread // 32, thread % 32 // 4, thread % 4
    seen = torch.zeros(rows, k, dtype=torch.int32)
    for block in range(-(-rows // 64 // c["kRowTiles"])):
        for step, shared in enumerate(stages(c, packed, scales, block)):
            for wg, half, tile in product(range(2), range(c["kHalves"]), range(per_wg)):
                row_tile = block * c["kRowTiles"] + wg * per_wg + tile
                if row_tile * 64 >= rows:
                    continue
                at = {**c, "thread": thread, "lane": thread % 32, "wg": wg, "stage": 0}
                at = c_locals(COMMON, "void multiply", "w_at s_at", at | {"half": half})
                at = c_locals(COMMON, "void multiply", "codes scales", at)
                fixed = at | {"w": at["codes"] + at["w_at"], "s": at["scales"] + at["s_at"]}
                fixed |= {"tile": tile, "group": 0}
                more = c_value(c_find(COMMON, ("void load_fragment",), "w +="), fixed)
                fixed["w"] = fixed["w"] + more
                rows_of = order[row_tile, warp, g]  # (128, 2)
                for part in range(c["kGroups"]):
                    scope = fixed | {"group": part}
                    first = step * c["kSpan"] + half * c["kK"] + part * group
                    fetch = "lds128(" if group >= 64 else "lds64("
                    for h in range(max(1, group // 64)):
                        text = c_find(COMMON, ("void load_fragment",), fetch)
                        address = c_value(text, scope | {"h": h})
                        size = 16 if group >= 64 else 8
                        words = shared[address[:, None] + torch.arange(size)].view(128, -1, 4)
                        column = first + h * 64 + torch.arange(size // 4) * 16
                        column = column + q[:, None] * 4
                        column = column[:, :, None] + torch.arange(4)
                        for row, values in zip(rows_of.T, decode_words(words), strict=True):
                            assert torch.equal(values, codes[2, row[:, None, None], column].int())
                            seen[row[:, None, None], column] += 1
                    address = c_value(c_find(COMMON, ("void load_fragment",), "lds32("), scope)
                    found = shared[address[:, None] + torch.arange(4)].contiguous()
                    assert torch.equal(
                        found.view(torch.bfloat16), wanted[2, rows_of, first // group]
                    )
    assert (seen == 1).all()


@pytest.mark.parametrize(("rows", "k", "group"), [(512, 512, 128), (768, 192, 32), (256, 64, 64)])
def test_ctas_of_a_cluster_copy_half_of_a_stage_each(rows: int, k: int, group: int) -> None:
    codes = torch.zeros(2, rows, k // 2, dtype=torch.uint8)
    scales = torch.zeros(2, rows, k // group, dtype=torch.bfloat16)
    alone = constants(UP, rows, k, group)
    c = constants(UP, rows, k, group, cluster=2)
    arrivals = c_find(RING, ("ring.tokens_full(i, h), 64",), "barrier_init(")
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


def produced_tokens(c: dict[str, Any], k: int, stage: int) -> list[dict[int, tuple[int, int]]]:
    """``produce_tokens``: (token, first column) of 16 bytes, by address, for each stage along K."""
    shared: list[dict[int, tuple[int, int]]] = [{} for _ in range(k // c["kSpan"])]
    within, function = "void produce_tokens", ("void produce_tokens",)
    for part, lane in product(range(2), range(32)):
        scope: dict[str, Any] = {**c, "part": part, "threadIdx": SimpleNamespace(x=lane)}
        scope |= {"k": k, "b": 0, "row": int, "list": range(c["kTokens"])}
        scope |= {"item": SimpleNamespace(count=c["kTokens"])}
        s = c_locals(COMMON, within, "lane kMine piece first swizzled to_lane at", scope)
        rows = []
        for j in range(s["kMine"]):
            row = c_locals(COMMON, within, "c", s | {"j": j})
            rows.append(c_value(c_find(COMMON, function, "from[j]"), row))
        for found in shared:
            to, address = stage + s["to_lane"], 0
            for _ in range(c["kHalves"] * (c["kK"] // c["kPanel"])):
                for j in range(s["kMine"]):
                    copy = c_find(COMMON, function, "async_copy16(")
                    address, source = c_value(copy, s | {"j": j, "to": to, "from": rows})
                    assert address not in found and address % 16 == 0
                    found[address] = divmod(source, k)
                to += c_value(c_find(COMMON, function, "to +="), s)
                s["at"] += c_value(c_find(COMMON, function, "at +="), s)
    return shared


@pytest.mark.parametrize("k", [64, 128, 192, 256, 320, 512])
def test_panels_are_swizzled_as_wgmma_reads_them(k: int) -> None:
    """``produce_tokens`` against ``panel_descriptor`` and ``column_step``."""
    c, stage = constants(DOWN, 64, k, 64), 5 * 1024
    for step, shared in enumerate(produced_tokens(c, k, stage)):
        assert sorted(shared) == list(range(stage, stage + c["kHalves"] * c["kTokenBytes"], 16))
        for half, j in product(range(c["kHalves"]), range(c["kK"] // 32)):
            scope = {**c, "stage": stage, "half": half, "j": j}
            where = c_find(COMMON, ("void multiply",), "panel_descriptor(")
            scope["address"] = c_value(where, scope)
            scope = c_locals(COMMON, "u64 panel_descriptor", "kSwizzle", scope)
            found = c_value(c_find(COMMON, ("u64 panel_descriptor",), "return"), scope)
            found += c_value(c_find(COMMON, ("u64 column_step",), "return"), scope)
            # PTX ISA: bits 0-13 address, 32-45 stride of eight rows, 62-63 swizzle of 128 or 64
            # bytes: address bits 7-9 or 7-8 are added to bits 4-6 or 4-5.
            start, stride = (found & 0x3FFF) << 4, (found >> 32 & 0x3FFF) << 4
            row_bytes, bits = {1: (128, 7), 2: (64, 3)}[found >> 62]
            for token, piece in product(range(c["kTokens"]), range(2)):
                address = start + token // 8 * stride + token % 8 * row_bytes + piece * 16
                address ^= (address >> 7 & bits) << 4
                column = step * c["kSpan"] + half * c["kK"] + j * 32 + piece * 16
                assert shared[address] == (token, column)


def test_gate_and_up_end_as_the_feature_of_their_rows() -> None:
    for rows, k, per_wg in (
        (512, 256, 2),
        (384, 256, 1),
        (896, 256, 2),
        (128, 64, 1),
        (512, 64, 2),
    ):
        c = constants(UP, rows, k, 64, per_wg)
        order = _row_order(rows, True, 1).view(-1, 4, 8, 2)
        features = []
        for block, wg in product(range(-(-rows // 64 // c["kRowTiles"])), range(2)):
            item = SimpleNamespace(block=block)
            p = SimpleNamespace(weights=SimpleNamespace(rows=rows))
            scope = {**c, "item": lambda item=item: item, "p": p, "wg": wg}
            s = c_locals(UP, "void run()", "row_tile tiles", scope)
            gathered = {}
            for thread, t in product(range(128), range(per_wg)):
                f = c_locals(UP, "void run()", "f", {"thread": thread, "lane": thread % 32})["f"]
                assert c["kPitch"] >= per_wg * 32 and (per_wg - 1) * 32 + f < c["kFeatures"]
                gathered[t * 32 + f] = s["row_tile"] + t, thread // 32, thread % 32 // 4
            for piece in range(c["kFeatures"] // 16):
                if piece * 16 < s["tiles"] * 32:
                    for byte in range(16):
                        tile, warp, g = gathered[piece * 16 + byte]
                        at = s["row_tile"] * 32 + piece * 16 + byte
                        assert order[tile, warp, g].tolist() == [at, at + rows // 2]
                        features.append(at)
        assert sorted(features) == list(range(rows // 2))


# ---- y -------------------------------------------------------------------------------------------
Value = tuple[int, int, int]  # row tile of the warpgroup, row in it, column of the tile of tokens


def run_stores(c: dict[str, Any], wg: int, first: int, columns: int) -> dict[int, list[Value]]:
    """The epilogue of ``DownBody::run``: words of shared memory (two values), by address."""
    item = SimpleNamespace(first=first, count=columns)
    run = ("void run()",)
    lanes = []
    for thread in range(128):
        scope = {**c, "thread": thread, "lane": thread % 32, "wg": wg, "out_at": 0}
        scope |= {"item": lambda: item, "make_uint4": lambda *words: words}
        scope |= {"pack_bf16": lambda low, high: [low, high]}
        scope |= {"__shfl_xor_sync": lambda mask, value, distance: (value, distance)}
        lanes.append(c_locals(DOWN, "void run()", "g odd to row piece", scope))
    packed = [c_find(DOWN, run, f"token[e][{t}]").replace(" * scale", "") for t in range(2)]
    sent = [c_find(DOWN, run, name) for name in ("other0", "other1")]
    shared: dict[int, list[Value]] = {}
    for i in range(0, columns // 2, 4):
        for thread, s in enumerate(lanes):
            # wgmma's accumulators: acc[i] and acc[i + 1] are two columns of eight, the next two the
            # same eight rows below.
            upper, c0 = thread // 32 * 16 + thread % 32 // 4, i * 2 + thread % 4 * 2
            acc = [
                {i + 2 * r + e: (t, upper + 8 * r, c0 + e) for r in range(2) for e in range(2)}
                for t in range(2)
            ]
            s |= {"acc": acc, "i": i}
            s["token"] = [[c_value(text, s | {"e": e}) for text in packed] for e in range(2)]
        addresses = []
        for thread, s in enumerate(lanes):
            scope = dict(s)
            for name, text in zip(("other0", "other1"), sent, strict=True):
                _, distance = c_value(text, s)
                scope[name], _ = c_value(text, lanes[thread ^ distance])
            address, words = c_value(c_find(DOWN, run, "sts128("), scope)
            addresses.append(address)
            for n, word in enumerate(words):
                assert address + 4 * n not in shared, "stored twice"
                shared[address + 4 * n] = word
        for eight in range(0, 128, 8):
            banks = {address // 16 % 8 for address in addresses[eight : eight + 8]}
            assert len(banks) == 8, "bank conflicts"
    return shared


@pytest.mark.parametrize(
    ("k", "rows", "first", "columns"),
    [
        (256, 704, 37, 48),
        (192, 320, 0, 16),
        (128, 640, 37, 48),
        (128, 896, 6, 80),
        (64, 768, 0, 16),
        (64, 512, 37, 128),
        (256, 64, 37, 48),
        (64, 64, 0, 16),
        (128, 128, 6, 80),
        (64, 128, 37, 16),
    ],
)
def test_outputs_come_to_their_rows(k: int, rows: int, first: int, columns: int) -> None:
    """From a thread's accumulators through y to the rows of the checkpoint."""
    c = constants(DOWN, rows, k, 64)
    order = _row_order(rows, False, c["kLayoutTiles"]).view(-1, 4, 8, 2)
    text = c_text(DOWN)
    branches = re.findall(r"const int at = (row .*?);\n(.*?)\n    }", text, re.S)
    assert len(branches) == 3
    y = {}
    for wg in range(2):
        stored = run_stores(c, wg, first, columns)
        assert sorted(stored) == list(
            range(wg * c["kOutBytes"], wg * c["kOutBytes"] + columns * 256, 4)
        )
        for address, word in stored.items():  # the bulk copy
            y[wg, first * 256 + address - wg * c["kOutBytes"]] = word
    at_text, body = branches[{1: 0, 2: 1, 4: 2}[c["kLayoutTiles"]]]
    calls = re.findall(r"two\((.*?), r\[(\d)\], r\[(\d)\]\);", body)
    for column in range(0, columns, columns // 16):
        place = first + column
        for block in range(-(-rows // 256)):
            out: dict[int, tuple[int, ...]] = {}
            for lane in range(32):
                scope = {**c, "threadIdx": SimpleNamespace(x=lane), "lane": lane, "row": place}
                piece = c_locals(DOWN, "void add_up", "piece", scope | {"at": place})["piece"]
                scope = c_locals(DOWN, "void store(", "lane wg warp g", scope)
                p, blocks = SimpleNamespace(slice_blocks=8), {"step": 0, "block": block, "slice": 0}
                text = c_find(DOWN, ("void sum()",), "buffer(")
                _, _, from_wg = c_value(text, scope | blocks | {"p": p})
                r = [y[from_wg, place * 256 + piece + 4 * j] for j in range(4)]
                scope["at"] = c_value(at_text, scope | {"row": block * 256})
                for where, *two in calls:
                    at = c_value(where, scope)
                    if at < rows:
                        for n, value in enumerate(v for j in two for v in r[int(j)]):
                            assert at + n not in out, "written twice"
                            out[at + n] = from_wg, *value
            assert sorted(out) == list(range(block * 256, min(rows, block * 256 + 256)))
            for at, (wg, tile, row, from_column) in out.items():
                assert from_column == column
                row_tile = block * 4 + wg * 2 + tile
                warp, half, g = row // 16, row // 8 % 2, row % 8
                assert order[row_tile, warp, g, half] == at
