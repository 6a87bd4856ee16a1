"""Down whose CTAs own outputs, without a GPU: rows of q, sums and outputs, by address.

Index expressions are the kernels' own. What they are held against: wgmma's operands as the PTX ISA
has them, and the order of the module ``layout``.
"""

from __future__ import annotations

import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hopper_own import (
    FEED,
    JOBS,
    KERNEL,
    job_steps,
    own_constants,
    shared_at,
    shared_map,
    sum_offset,
)
from hopper_own import unpack_step as unpack
from hopper_route import ROUTE, Route, column_for, columns_of, names_twice, rank_in_order, words_of
from kernel_source import c_constants, c_find, c_locals, c_value

from sglang_w4afp8.kernels.hopper import plan_lists, plan_own, plan_prefill
from sglang_w4afp8.kernels.hopper.layout import StageShape, _row_order
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

UP = "prefill_up.cu"


# ---- q -------------------------------------------------------------------------------------------
def written_q(layer: Layer, found: Route, ups: dict[str, int], q_rows: int) -> dict[int, Any]:
    """What gate and up write: (pair, column) of 16 bytes, by address."""
    c = c_constants(UP, ups)
    panel = c["kOutPanel"]
    p = SimpleNamespace(q=0, q_rows=q_rows)
    q: dict[int, Any] = {}
    for place, pair in found.columns["up"].items():
        for column in range(0, layer.inner, 16):
            scope = {**c, "p": p, "row": found.rows[place], "column": column, "kColumns": panel}
            scope = c_locals(UP, "u8* q_piece", "number key at", scope)
            address = c_value(c_find(UP, ("u8* q_piece", "u64 at"), "return"), scope)
            assert address not in q and address % 16 == 0
            q[address] = pair, column
    return q


def copied_tokens(c: dict[str, Any], base: int, first: int, here: int, b_rows: int) -> list[Any]:
    """Bulk copies of a step: to, from and bytes. ``base``: of the token slot."""
    text = c_find(FEED, ("void produce_tokens",), "bulk_copy(")
    s = SimpleNamespace(tokens=lambda slot: base)
    scope = {**c, "s": s, "slot": 0, "now": SimpleNamespace(first=first, here=here), "full": 0}
    scope["p"] = SimpleNamespace(b=0, b_rows=b_rows)
    return [c_value(text, scope | {"lane": lane})[:3] for lane in range(c["kK"] // c["kPanel"])]


@pytest.mark.parametrize(
    ("inner", "group"), [(64, 64), (64, 32), (128, 128), (192, 64), (256, 128), (256, 32)]
)
def test_the_matrix_unit_reads_what_gate_and_up_wrote(
    inner: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_own, "OWN_TOKENS", (64, 128, 128))
    layer = Layer(6, 512, inner, 128, group, 3, False, False)
    tokens = 300
    order = random.Random(inner + group)
    # Others' experts, experts named twice, one that has most tokens.
    ids = [order.choice((0, 0, 0, 1, 2, 3, 4, 5, 6, -1)) for _ in range(tokens * layer.top_k)]
    plan = planned(layer, tokens, 132)
    assert plan.down.count > 2 and plan.room == 0
    c = own_constants(plan.launches[2].kernel)
    found = Route(ids, layer, plan, seed=inner)
    stride = plan.down.tokens * layer.top_k
    b_rows = plan.down.count * stride
    q = written_q(layer, found, dict(plan.launches[1].kernel.defines), b_rows)
    s = shared_map(c, 128, 100)
    read = set()
    cluster = c["kCluster"]
    for number in range(plan.down.count):
        group_first = number // cluster * cluster
        lists = range(group_first, min(group_first + cluster, plan.down.count))
        begins = [[found.first[i, e] for e in range(layer.experts + 1)] for i in lists]
        for at, bits in enumerate(job_steps(c, begins, number - group_first)):
            expert, first, here = unpack(bits)
            base = shared_at(c, s, "tokens", at % c["kTokenSlots"])
            memory: dict[int, Any] = {}
            for to, source, size in copied_tokens(c, base, number * stride + first, here, b_rows):
                memory |= {to + i: q[source + i] for i in range(0, size, 16)}
            for j in range(c["kK"] // 32 if here else 0):
                scope = {**c, "address": base, "j": j}
                scope = c_locals(JOBS, "u64 panel_descriptor", "kSwizzle", scope)
                text = c_find(JOBS, ("u64 panel_descriptor",), "return")
                descriptor = c_value(text, scope)
                text = c_find(JOBS, ("u64 column_step",), "return")
                descriptor += c_value(text, scope)
                # PTX ISA: see test_hopper_prefill_memory.py.
                start, step = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
                row_bytes, mask = {1: (128, 7), 2: (64, 3)}[descriptor >> 62]
                for column, piece in product(range(here), range(2)):
                    address = start + column // 8 * step + column % 8 * row_bytes + piece * 16
                    address ^= (address >> 7 & mask) << 4
                    pair = found.columns["down"][number * stride + first + column]
                    assert memory[address] == (pair, j * 32 + piece * 16)
                    assert ids[pair] == expert
                    read.add((pair, j * 32 + piece * 16))
    assert len(read) == len(q) == len(found.columns["up"]) * inner // 16


# ---- sums ----------------------------------------------------------------------------------------
def added_at(base: int, warp: int, lane: int) -> tuple[list[tuple[int, int]], int]:
    """``add``: of a lane's eight columns' words, (column, address); and XORed with what."""
    scope = c_locals(KERNEL, "void add(", "g q mine", {"lane": lane, "warp": warp})
    found = []
    for b in range(6):
        meta: dict[int, int] = {8 * i: base + i for i in range(48)}  # where columns' sums are
        meta |= {8 * i + 4: i for i in range(48)}  # and their weights
        address = c_value(c_find(KERNEL, ("void add(",), "lds128("), {**scope, "meta": 0, "b": b})
        m = SimpleNamespace(**{name: meta[address + 4 * i] for i, name in enumerate("xyzw")})
        for at in ("[2 * b]", "[2 * b + 1]"):
            where, weight = (
                c_value(c_find(KERNEL, ("void add(",), name + at), scope | {"m": m})
                for name in ("at", "by")
            )
            column = b * 8 + scope["q"] * 2 + (at != "[2 * b]")
            assert weight == column
            found.append((column, (where ^ scope["mine"]) - base))
    return found, scope["mine"]


def test_a_lane_adds_to_the_columns_of_its_accumulators() -> None:
    for warp, lane in product(range(4), range(32)):
        found, _ = added_at(1 << 20, warp, lane)
        for place, (column, number) in enumerate(found):
            # wgmma: v[4 b + 0, 1] are columns 8 b + 2 q and the next, the other two 8 rows below
            assert column == number == place // 2 * 8 + lane % 4 * 2 + place % 2
    for name, low, high in (("more[2 * b]", 0, 2), ("more[2 * b + 1]", 1, 3)):
        scope = {"b": 5, "v": list(range(24)), "pack_half": lambda *two: two}
        assert c_value(c_find(KERNEL, ("void add(",), name), scope) == (20 + low, 20 + high)


@pytest.mark.parametrize(
    ("rows", "k", "tiles"),
    [(640, 256, 1), (704, 128, 1), (640, 128, 2), (512, 64, 4), (512, 192, 1)],
)
def test_every_sum_comes_to_its_column(rows: int, k: int, tiles: int) -> None:
    shape = StageShape.of(rows, k, 64, False)
    assert shape.tiles == tiles
    c = {"kLayoutTiles": shape.tiles, "kMostTokens": 256}
    order = _row_order(rows, False, shape.tiles).view(-1, 4, 8, 2)
    base = 7 * 128
    s = SimpleNamespace(sums=base)
    owners: dict[int, tuple[int, int, int, int]] = {}  # of halves, by address
    for t, warp, lane in product(range(c["kMostTokens"]), range(4), range(0, 32, 4)):
        _, mine = added_at(0, warp, lane)
        for half in range(2):
            address = ((base + sum_offset(t)) ^ mine) + 2 * half
            assert address not in owners, "two sums in one place"
            owners[address] = t, warp, lane // 4, half
            assert base <= address < base + c["kMostTokens"] * 128
    # Columns without a pair have rows behind all tokens, and lanes share none of their words.
    nobody = int(c_find(JOBS, (), "kNobody"))
    scope = {**c, "s": s, "kNobody": nobody, "sum_offset": sum_offset}
    text = c_find(FEED, ("void produce_tokens",), "u32 at")
    padding = [c_value(text, scope | {"lane": column % 32}) for column in range(48)]
    behind = range(base + c["kMostTokens"] * 128, base + (c["kMostTokens"] + nobody) * 128)
    for warp, lane in product(range(4), range(32)):
        found, mine = added_at(0, warp, lane)
        for address in {padding[column] ^ mine for column, _ in found}:
            for half in range(2):
                owner = owners.setdefault(address + 2 * half, (-1, warp, lane, half))
                assert owner == (-1, warp, lane, half), "two lanes' sums in one place"
            assert address in behind
    assert sum(owner[0] < 0 for owner in owners.values()) == nobody * 64
    assert "i < (kMostTokens + kNobody) * 8; i += kConsumers" in c_text_of("void consume()")
    outputs: dict[tuple[int, int], tuple[int, ...]] = {}
    for tile, t in product(range(rows // 64), (0, 1, 2, 3, 6, 255)):
        for word, place in words_written(c | {"s": s}, rows, tile, t):
            for half in range(2):
                assert (t, place + half) not in outputs, "an output twice"
                outputs[t, place + half] = (tile, *owners[word + 2 * half])
    for (t, place), (tile, token, warp, g, half) in outputs.items():
        assert token == t and order[tile, warp, g, half] == place
    assert len(outputs) == 6 * rows


def words_written(scope: dict[str, Any], rows: int, tile: int, t: int) -> list[tuple[int, int]]:
    """Of a token: addresses of words of its sums, and which output the first half of each is."""
    job, p = SimpleNamespace(tile=tile), SimpleNamespace(out=0, weights=SimpleNamespace(rows=rows))
    scope = scope | {"t": t, "sum_offset": sum_offset, "job": job, "p": p, "first": 0}
    found = []
    if scope["kLayoutTiles"] == 1:
        of_piece = balanced(c_find(KERNEL, ("void write_rows(",), "lds128("))
        assert "out + job.tile * 64 + (i & 7) * 8)" in c_text_of("void write_rows(")
        for piece in range(8):
            address = c_value(of_piece, scope | {"i": t * 8 + piece})
            place = c_value("job.tile * 64 + (i & 7) * 8", scope | {"i": t * 8 + piece})
            found += [(address + 4 * j, place + 2 * j) for j in range(4)]
    else:
        word = balanced(c_find(KERNEL, ("void write_pieces(",), "lds32("))
        out = c_find(KERNEL, ("void write_pieces(",), "u16* out")
        body = c_text_of("void write_pieces(")
        assert "out + static_cast<u64>(t) * p.weights.rows) = scaled(v[j]" in body
        for lane in range(32):
            here = scope | {"lane": lane}
            found.append((c_value(word, here), c_value(out, here)))
        # A warp's words of a token are in as few sectors as they can be.
        assert len({2 * place // 32 for _, place in found}) == 4 * scope["kLayoutTiles"]
    return found


def balanced(text: str) -> str:
    return text + ")" * (text.count("(") - text.count(")"))


def c_text_of(function: str) -> str:
    """A member function's text, up to the next one's."""
    from sglang_w4afp8.kernels.hopper.build import CSRC

    text = (CSRC / KERNEL).read_text()
    start = text.index(function)
    return " ".join(text[start : text.index("\n  }\n", start)].split())


def test_the_four_tokens_of_an_instruction_spread_over_banks() -> None:
    """As far as their numbers differ in the last two bits."""
    for tokens in product(range(4), repeat=4):
        banks: dict[int, set[int]] = {}
        for lane in range(32):
            address = sum_offset(tokens[lane % 4] + 8) ^ added_at(0, 0, lane)[1]
            banks.setdefault(address // 4 % 32, set()).add(address)
        worst = max(len(addresses) for addresses in banks.values())
        assert worst <= max(map(tokens.count, tokens)), tokens
        assert len({*tokens}) < 4 or worst == 1


# ---- classes -------------------------------------------------------------------------------------
def lanes_together() -> list[list[int]]:
    """Columns that the lanes of a warp add to at once, from those that ``add`` gives each lane."""
    of_lanes = [[column for column, _ in added_at(0, 0, lane)[0]] for lane in range(4)]
    return [list(columns) for columns in zip(*of_lanes, strict=True)]


TOGETHER = lanes_together()


def conflicts(tokens: list[int], columns: int) -> list[int]:
    """How often the banks are needed for each group of four of an expert's tokens.

    Args:
        tokens: by column, numbers in the list.
        columns: of a step.
    """
    found = []
    for begin in range(0, len(tokens), columns):
        step = dict(enumerate(tokens[begin : begin + columns]))
        for group in TOGETHER:
            chunks = [sum_offset(step[column]) // 32 % 4 for column in group if column in step]
            if chunks:
                found.append(max(map(chunks.count, chunks)))
    return found


@pytest.mark.parametrize("most", [2, 5, 12, 90])
def test_columns_of_an_expert_spread_over_banks(most: int) -> None:
    order = random.Random(most)
    vectors = list(product(range(3), repeat=4)) if most == 2 else []
    vectors += [tuple(order.randint(0, most) for _ in range(4)) for _ in range(150)]
    for pairs in vectors:
        n, packed = sum(pairs), sum(count << 16 * k for k, count in enumerate(pairs))
        places = [columns_of(n, k) for k in range(4)]
        assert places == [sum(p % 8 // 2 == k for p in range(n)) for k in range(4)]
        tokens = [-1] * n
        for k, count in enumerate(pairs):
            for r in range(count):
                column = column_for(packed, k, r)
                assert tokens[column] == -1, "two in one column"
                assert (column % 8 // 2 == k) or r >= places[k]
                tokens[column] = k
        assert -1 not in tokens
        found = conflicts(tokens, 48)
        # Each pair left over is in the way of one group at most.
        left = sum(max(count - place, 0) for count, place in zip(pairs, places, strict=True))
        assert max(*pairs, len(found)) <= sum(found) <= len(found) + left
        assert left or set(found) <= {1}
        if any(count > place == len(found) for count, place in zip(pairs, places, strict=True)):
            alone = sum(count > place for count, place in zip(pairs, places, strict=True)) == 1
            assert not alone or sum(found) == max(pairs), "no order is better"


def test_additions_meet_few_conflicts() -> None:
    layer, tokens = Layer(256, 7168, 256, 128, 128, 8, False, False), 2048
    order = random.Random(5)
    ids = [e for _ in range(tokens) for e in order.sample(range(layer.experts), layer.top_k)]
    plan = planned(layer, tokens, 132)
    columns = own_constants(plan.launches[2].kernel)["kColumns"]
    found = Route(ids, layer, plan, seed=5)
    assert plan.down.count == 2 and plan.down.parts > 1 and not any(found.twice)
    ours, theirs = [], []
    for number, e in product(range(plan.down.count), range(layer.experts)):
        begin = number * plan.down.tokens
        in_list = range(found.first[number, e], found.first[number, e + 1])
        pairs = [found.columns["down"][begin * layer.top_k + i] for i in in_list]
        assert all(ids[pair] == e for pair in pairs)
        local = [pair // layer.top_k - begin for pair in pairs]
        for token in local:
            assert sum_offset(token) // 32 % 4 == (token + begin) % 4, "classes of other tokens"
        ours += conflicts(local, columns)
        theirs += conflicts(order.sample(local, len(local)), columns)
    assert sum(ours) / len(ours) < 1.45 < 1.9 < sum(theirs) / len(theirs)


def test_lists_and_parts_begin_with_the_first_class() -> None:
    for experts, top_k in ((256, 8), (64, 6), (512, 10), (16, 1), (32, 32), (8, 3)):
        layer = Layer(experts, 2048, 256, 128, 128, top_k, False, False)
        own = plan_own.own_tokens(layer)
        for tokens in {1, 7, 9, own - 1, own, own + 1, 2 * own + 1, 3 * own, 5 * own - 3}:
            plan = planned(layer, tokens, 132)
            assert plan.room == 0 and plan.down.tokens % 8 == 0
            assert plan.part_pairs % (8 * top_k) == 0
            assert own_constants(plan.launches[2].kernel)["kColumns"] % 8 == 0
    most = plan_own.OWN_TOKENS[-1] * plan_prefill.MAX_TOP_K
    assert max(most, plan_lists.SORT_PAIRS) < 1 << 16, "halves of a word, and their sum"


# ---- order ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_in_the_order_of_pairs(seed: int) -> None:
    order = random.Random(seed)
    for size in (1, 31, 33, 700, ROUTE["kPart"]):
        keys = [order.choice((-1, 0, 0, 1, 2, 5, 2046, 2047)) for _ in range(size)]
        counts = [0] * 1024
        found = rank_in_order(keys, counts)
        seen = [0] * 2048
        for pair, key in enumerate(keys):
            assert found[pair] == (key + 65536 * seen[key] if key >= 0 else -1)
            seen[key] += key >= 0
        assert [half for word in counts for half in words_of([word])[:2]] == seen


def test_places_where_a_token_names_an_expert_twice_are_known() -> None:
    """Whatever the order of atomics, in this part and in the others of its list."""
    layer, tokens = Layer(6, 512, 256, 128, 128, 3, False, False), 700
    order = random.Random(7)
    ids = [e for _ in range(tokens) for e in order.sample(range(layer.experts), layer.top_k)]
    plan = planned(layer, tokens, 132)
    assert plan.down.parts > 1
    part = plan.part_pairs
    for token in (0, 5, (2 * part + 5) // layer.top_k):  # of two parts
        ids[token * layer.top_k] = ids[token * layer.top_k + 1]
    routes = [Route(ids, layer, plan, seed=seed) for seed in range(3)]
    twice = routes[0].twice
    assert 2 == sum(twice) < len(twice) and all(found.twice == twice for found in routes)
    places = [{pair: at for at, pair in found.columns["down"].items()} for found in routes]
    moved = {pair // part for pair in places[0] if len({at[pair] for at in places}) > 1}
    assert moved and not any(twice[number] for number in moved)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8, 10, 32, 48])
def test_a_token_that_names_an_expert_twice_is_found(top_k: int) -> None:
    order = random.Random(top_k)
    for trial in range(12):
        tokens = order.randint(9, 60)
        part = 8 * top_k  # pairs
        ids = [e for _ in range(tokens) for e in order.sample(range(60), top_k)]
        where = []
        if trial % 3 and top_k > 1:
            token = order.randrange(tokens)
            a, b = order.sample(range(top_k), 2)
            ids[token * top_k + a] = ids[token * top_k + b]
            where = [token * top_k // part]
        if trial % 3 == 2:  # an expert of another rank does not count
            where = [] if top_k > 1 else where
            ids = [-1 if ids.count(e) and top_k > 1 and t // top_k == token and
                   ids[token * top_k:(token + 1) * top_k].count(e) > 1 else e
                   for t, e in enumerate(ids)]  # fmt: skip
        for begin in range(0, len(ids), part):
            found = names_twice(ids, ids[begin : begin + part], begin, top_k)
            assert found == (begin // part in where)
