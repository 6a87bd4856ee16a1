"""Time per decoded token on paper: bytes read, bytes exchanged, and what follows from data sheets.

**An estimate, and an optimistic one.** It adds the time to read weights and cache to the time of
the collectives; it knows nothing of launch gaps, of prefill in between, of sampling, or of a kernel
that is slow. Use it to compare layouts. Its one comparison with a published run: :data:`PUBLISHED`.

Reading. A step of B sequences reads every weight of the rank once, of the experts those that any
token chose: ``E · (1 − (1 − top_k / E)^B)`` of E when choices are uniform and independent. Cache:
B · context tokens, whole on every rank for MLA. Rate: :data:`READ_SHARE` of the data sheet's.

Multiplying. ``2 · active parameters · B / tp`` operations at :data:`MATH_SHARE` of the FP8 rate; a
step takes the longer of reading and multiplying.

Exchanging. Two all-reduces a layer (after attention, after the MLP or the experts) and one for the
embedding, each of ``B · hidden`` BF16 numbers. Time of one is NCCL's cost model, simplified
(``src/graph/tuning.cc``): base latency, plus steps times latency per hop, plus bytes over bus
bandwidth; ring: ``2 (n − 1)`` steps, ``2 · nodes`` of them between machines, ``2 (n − 1) / n`` of
the bytes; tree: ``2 ((n / nodes − 1) + log2 nodes)`` steps, twice the bytes; protocols LL, LL128;
in one NVLink domain from Hopper on also the switch's own reduction (NVLS), the bytes once; the
cheapest counts. Left out: NCCL's correction factors, its protocol Simple, and that by default it
keeps LL128 to NVLink; over PCIe large messages take longer than this says. SGLang's all-reduce
kernels for up to 8 GPUs of a machine are faster than that.
Then the logits' all-gather, ``B · vocabulary`` BF16 numbers.

Expert parallelism with data-parallel attention, for comparison: a rank holds attention, shared
expert and dense MLPs whole and ``E / ranks`` whole experts, serves ``B / ranks`` sequences, and
sends each token to ``top_k`` ranks in FP8 and back in BF16 per MoE layer; routing is taken to be
balanced, which it is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log2
from typing import Any

from sglang_w4afp8.tools.console import print_json
from sglang_w4afp8.tools.plan_gpus import Gpu
from sglang_w4afp8.tools.plan_model import Model
from sglang_w4afp8.tools.plan_ranks import ClassRow, plan_kv, plan_rank

READ_SHARE = 0.8
MATH_SHARE = 0.5
LINK_SHARE = 0.8
"""Of a link's data-sheet rate."""
CONTEXT = 300
"""Tokens in a sequence, on average, of a run with 200 tokens in and 200 out."""
DEGREES = (8, 16, 32, 64)
BATCHES = (1, 128)
RANKS_PER_NODE = 8
PUBLISHED: dict[str, Any] = {
    "what": "DeepSeek-R1 FP8 in 64×64 blocks, 4 × 8 L40S, TP 32, sglang.bench_serving, random 200 "
    "in / 200 out, 256 prompts, concurrency 128",
    "output_tokens_per_s": 473,
    "itl_ms": 232,
    "ttft_ms": 7800,
}

# NCCL's latencies in µs, by protocol: (base, NVLink, PCIe, network), from tuning.cc.
_RING = {"LL": (6.6, 0.6, 1.0, 2.7), "LL128": (14.0, 1.9, 2.5, 4.0)}
_TREE = {"LL": (6.8, 0.6, 1.0, 5.0), "LL128": (14.0, 1.25, 1.9, 8.5)}
_NVLS_US = 25.0
# Part of the bytes on the wire that is data: LL sends a flag with every 4 bytes, LL128 8 in 128.
_DATA_SHARE = {"LL": 0.5, "LL128": 120 / 128}


@dataclass(frozen=True)
class Fabric:
    """How ranks are connected.

    Attributes:
        name: short name.
        title: for people.
        local: 1 for NVLink, 2 for PCIe: column of NCCL's latency table.
        local_gb_s: per direction and GPU inside a machine, 0 for the card's own NVLink.
        network_gb_s: per direction and machine between machines; 0 if all ranks share one domain.
    """

    name: str
    title: str
    local: int
    local_gb_s: float
    network_gb_s: float

    def bus_gb_s(self, ranks: int, gpu: Gpu) -> float:
        """Bandwidth of a ring or tree over ``ranks``, after :data:`LINK_SHARE`."""
        local = self.local_gb_s or gpu.nvlink_gb_s
        crosses = self.network_gb_s and ranks > RANKS_PER_NODE
        return LINK_SHARE * (min(local, self.network_gb_s) if crosses else local)

    def nodes(self, ranks: int) -> int:
        """Machines, or NVLink domains."""
        return max(1, ranks // RANKS_PER_NODE) if self.network_gb_s else 1


FABRICS = {
    fabric.name: fabric
    for fabric in (
        Fabric("nvlink", "all ranks in one NVLink domain", 1, 0, 0),
        Fabric("rdma", "NVLink in a machine of 8, a 400 Gb/s NIC per GPU", 1, 0, 400),
        Fabric("pcie", "PCIe 4.0 x16 in a machine of 8, one 400 Gb/s NIC", 2, 32, 50),
    )
}


def all_reduce_us(nbytes: float, ranks: int, fabric: Fabric, gpu: Gpu) -> float:
    """Time of one all-reduce of ``nbytes`` per rank, in µs; see the module."""
    nodes = fabric.nodes(ranks)
    us_per_byte = 1e-3 / fabric.bus_gb_s(ranks, gpu)
    times = []
    for protocol, share in _DATA_SHARE.items():
        base, *hops = _RING[protocol]
        between = 2 * nodes if nodes > 1 else 0
        steps = (2 * (ranks - 1) - between) * hops[fabric.local - 1] + between * hops[2]
        times.append(base + steps + 2 * (ranks - 1) / ranks * nbytes * us_per_byte / share)
        base, *hops = _TREE[protocol]
        steps = 2 * ((ranks // nodes - 1) * hops[fabric.local - 1] + log2(nodes) * hops[2])
        times.append(base + steps + 2 * nbytes * us_per_byte / share)
    if nodes == 1 and fabric.local == 1 and gpu.capability >= (9, 0):
        times.append(_NVLS_US + nbytes * us_per_byte)
    return min(times) if ranks > 1 else 0.0


def touched(experts: int, top_k: int, tokens: float) -> float:
    """Share of a layer's experts that ``tokens`` choose, uniformly and independently."""
    return 1 - (1 - top_k / experts) ** tokens


@dataclass(frozen=True)
class Estimate:
    """One layout at one batch.

    Attributes:
        tp: ranks.
        batch: sequences decoded together.
        weight_bytes: read per step and rank.
        kv_bytes: read per step and rank.
        exchanged_bytes: all-reduced per token and rank: what one rank puts in.
        read_ms: reading (or multiplying, if longer).
        exchange_ms: collectives.
    """

    tp: int
    batch: int
    weight_bytes: int
    kv_bytes: int
    exchanged_bytes: int
    read_ms: float
    exchange_ms: float

    @property
    def itl_ms(self) -> float:
        """Time between two tokens of a sequence."""
        return self.read_ms + self.exchange_ms

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Decoded tokens a second, over all GPUs."""
        return self.batch / self.itl_ms * 1e3 / self.tp

    def as_row(self) -> dict[str, Any]:
        """For JSON, derived numbers included, rounded."""
        numbers = asdict(self) | {"itl_ms": self.itl_ms, "tok_s_gpu": self.tokens_per_s_per_gpu}
        return {key: round(n, 3) if isinstance(n, float) else n for key, n in numbers.items()}


def estimate(
    model: Model,
    tp: int,
    batch: int,
    gpu: Gpu,
    fabric: Fabric,
    *,
    context: int = CONTEXT,
    fp8_experts: bool = False,
) -> Estimate:
    """Tensor parallelism over ``tp`` ranks.

    Args:
        model: the model.
        tp: ranks; must pass ``Model.check``.
        batch: sequences.
        gpu: the card.
        fabric: the network.
        context: tokens of cache per sequence.
        fp8_experts: experts at one byte a weight, to compare with runs of FP8 checkpoints.
    """
    rows = plan_rank(model, tp, 1, gpu).rows
    share = touched(model.experts, model.top_k, batch)
    weights = sum(_read_bytes(row, share, fp8_experts) for row in rows)
    cache = batch * context * plan_kv(model, tp, gpu, 0).bytes_per_token
    exchanged = (2 * model.layers + 1) * model.hidden * 2
    one = all_reduce_us(batch * model.hidden * 2, tp, fabric, gpu)
    logits = batch * model.vocab * 2 / fabric.bus_gb_s(tp, gpu) / 1e6
    read_ms = (weights + cache) / (READ_SHARE * gpu.read_gb_s) / 1e6
    return Estimate(
        tp, batch, round(weights), cache, exchanged,
        max(read_ms, _math_ms(model, batch, tp, gpu)), (2 * model.layers + 1) * one / 1e3 + logits,
    )  # fmt: skip


def estimate_ep(
    model: Model, ranks: int, batch: int, gpu: Gpu, fabric: Fabric, *, context: int = CONTEXT
) -> Estimate:
    """Expert parallelism with data-parallel attention over as many ranks; see the module."""
    local = max(1.0, batch / ranks)
    busy = min(ranks, batch)
    share = touched(model.experts, model.top_k, batch)
    whole = {row.name: row for row in plan_rank(model, 1, 1, gpu).rows}
    weights = sum(
        _read_bytes(row, share, False) / (ranks if name.startswith("experts") else 1)
        for name, row in whole.items()
    )
    cache = round(local * context * plan_kv(model, 1, gpu, 0).bytes_per_token)
    moe_layers = len(model.moe_layers)
    sent = local * model.top_k * model.hidden * 3
    crosses = fabric.network_gb_s and ranks > RANKS_PER_NODE
    rate = fabric.network_gb_s / RANKS_PER_NODE if crosses else fabric.bus_gb_s(ranks, gpu)
    hop = _RING["LL"][3 if crosses else fabric.local]
    exchange_us = 2 * (_RING["LL"][0] + hop) + sent / (LINK_SHARE * rate) / 1e3
    read_ms = (weights + cache) / (READ_SHARE * gpu.read_gb_s) / 1e6
    return Estimate(
        ranks, batch, round(weights), cache, moe_layers * model.top_k * model.hidden * 3,
        max(read_ms, _math_ms(model, batch, busy, gpu)), moe_layers * exchange_us / 1e3,
    )  # fmt: skip


def _read_bytes(row: ClassRow, share: float, fp8_experts: bool) -> float:
    if row.name.startswith("experts"):
        height, width = row.local_shape
        whole = row.layers * row.copies * height * width if fp8_experts else row.nbytes
        return share * whole
    if row.name.endswith("kv_b_proj") and not row.name.startswith("absorbed"):
        return 0  # decoding reads the absorbed copy
    return row.nbytes / row.layers if row.name.startswith("embedding") else row.nbytes


def _math_ms(model: Model, batch: int, ranks: int, gpu: Gpu) -> float:
    chosen = model.expert_parameters * model.top_k / model.experts
    active = model.parameters - model.expert_parameters + chosen
    return 2 * active * batch / ranks / (MATH_SHARE * gpu.fp8_tflops) / 1e9


def table(model: Model, gpu: Gpu) -> list[dict[str, Any]]:
    """Every degree, fabric and batch that makes sense for the card."""
    rows = []
    for fabric in FABRICS.values():
        if not (fabric.local_gb_s or gpu.nvlink_gb_s):
            continue
        for tp in (d for d in DEGREES if d in model.degrees()):
            fits = plan_kv(model, tp, gpu, plan_rank(model, tp, 1, gpu).nbytes).free_gib > 0
            for batch in BATCHES:
                ep = estimate_ep(model, tp, batch, gpu, fabric)
                found = estimate(model, tp, batch, gpu, fabric).as_row()
                rows.append(
                    {"gpu": gpu.name, "fabric": fabric.name, "fits": fits, **found}
                    | {"ep_fits": ep_fits(model, tp, gpu), "ep_itl_ms": round(ep.itl_ms, 3)}
                )
    return rows


def ep_fits(model: Model, ranks: int, gpu: Gpu) -> bool:
    """Whether whole attention and shared layers and ``E / ranks`` experts fit on a card."""
    held = sum(
        row.nbytes // (ranks if row.name.startswith("experts") else 1)
        for row in plan_rank(model, 1, 1, gpu).rows
    )
    return plan_kv(model, ranks, gpu, held).free_gib > 0


def run_scaling(model: Model, gpu: Gpu, *, as_json: bool) -> int:
    """Print :func:`table`; always 0."""
    rows = table(model, gpu)
    if as_json:
        head = {"model": model.name, "estimate": True, "context_tokens": CONTEXT}
        print_json(head | {"published": PUBLISHED, "rows": rows})
        return 0
    print(
        f"{model.name} on {gpu.title}: an ESTIMATE from data sheets, not a measurement. It leaves"
    )
    print("out launch gaps, prefill and load imbalance: real servers are slower.")
    print(f"Each sequence has {CONTEXT} tokens of context.")
    if plan_rank(model, 1, 1, gpu).backend == "torch":
        print(
            f"It assumes a fast expert kernel, which this package has none of for {gpu.title} yet."
        )
    print()
    print(
        f"{'network':<8} {'tp':>3} {'batch':>6} {'weights read':>13} {'cache read':>11} "
        f"{'all-reduced':>13} {'read':>9} {'network':>9} {'ITL':>9} {'EP ITL':>9} {'tok/s/GPU':>10}"
    )
    for row in rows:
        print(
            f"{row['fabric']:<8} {row['tp']:>3} {row['batch']:>6} "
            f"{row['weight_bytes'] / 1e9:>10.2f} GB {row['kv_bytes'] / 1e9:>8.2f} GB "
            f"{row['exchanged_bytes'] / 1e6:>8.2f} MB/t {row['read_ms']:>6.1f} ms "
            f"{row['exchange_ms']:>6.1f} ms {row['itl_ms']:>6.1f} ms "
            + (f"{row['ep_itl_ms']:>6.1f} ms" if row["ep_fits"] else f"{'no fit':>9}")
            + f" {row['tok_s_gpu']:>10.0f}"
            + ("" if row["fits"] else "  does not fit")
        )
    print("\nnetworks: " + "; ".join(f"{f.name} = {f.title}" for f in FABRICS.values()))
    print(
        f"published: {PUBLISHED['what']}: {PUBLISHED['output_tokens_per_s']} output tok/s, "
        f"ITL {PUBLISHED['itl_ms']} ms, TTFT {PUBLISHED['ttft_ms'] / 1e3:.1f} s"
    )
    return 0
