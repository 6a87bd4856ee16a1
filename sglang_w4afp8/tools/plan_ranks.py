"""What one rank holds: shapes, scales, bytes per class of tensor; and the tokens that fit beside.

Shapes come from :mod:`sglang_w4afp8.sharding`, the same objects by which the loader copies; the
backend's verdicts from :mod:`sglang_w4afp8.kernels.registry`, which chooses in the server too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_w4afp8.kernels.registry import Verdict, explain, select
from sglang_w4afp8.layer import MoEProblem
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.tools.plan_gpus import Gpu
from sglang_w4afp8.tools.plan_model import Linear, Model

CONTEXT_GIB = 1.0
"""Taken by the CUDA context and NCCL before the model loads; about, it differs by driver."""


@dataclass(frozen=True)
class ClassRow:
    """One line of the table: a class of tensors on one rank.

    Attributes:
        name: the tensors.
        layers: how many layers have them.
        local_shape: of one matrix on a rank, all logical outputs together.
        copies: matrices a layer, the rank's experts; 1 elsewhere.
        scales: what one scale belongs to on the rank.
        cut: what happens to it, in words.
        divides: whether SGLang's own code cuts it right.
        nbytes: bytes of the rank, all layers.
    """

    name: str
    layers: int
    local_shape: tuple[int, int]
    copies: int
    scales: str
    cut: str
    divides: bool
    nbytes: int


@dataclass(frozen=True)
class RankPlan:
    """One rank of a layout.

    Attributes:
        rows: the table.
        mtp_bytes: bytes more with the MTP layers, whose experts are INT4 like the others.
        backend: what runs the experts.
        verdicts: every backend's reason against the layer, None for none.
    """

    rows: tuple[ClassRow, ...]
    mtp_bytes: int
    backend: str
    verdicts: tuple[Verdict, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, MTP not counted."""
        return sum(row.nbytes for row in self.rows)


def plan_rank(model: Model, tp: int, ep: int, gpu: Gpu) -> RankPlan:
    """The largest rank's part: ranks differ only in how far a kernel has to pad.

    Raises:
        ShardError: the model cannot be cut that way.
        BackendError: the forced backend cannot run the experts.
    """
    model.check(tp, ep)
    shards = [
        AxisShard.even(model.expert_width, model.spec.group_size, rank, tp // ep)
        for rank in range(tp // ep)
    ]
    columns = max(shards, key=lambda shard: shard.aligned.size)
    problem = MoEProblem(
        num_experts=model.experts // ep,
        hidden_size=model.hidden,
        columns=columns,
        group_size=model.spec.group_size,
        top_k=model.top_k,
        scheme=model.spec.moe_activation,
        device=gpu.device,
        dtype=torch.bfloat16,
    )
    backend = select(problem).name
    rows = [
        *_experts(model, ep, columns, padded=backend == "cutlass"),
        *(_linear(linear, model, tp, gpu) for linear in model.linears),
    ]
    if model.absorbed_rows:
        height = model.absorbed_rows // tp
        width = next(x.columns for x in model.linears if x.path.endswith("kv_b_proj"))
        rows.append(
            ClassRow("absorbed kv_b_proj", model.layers, (height, width), 1, "BF16",
                     "second copy that MLA keeps", True, 2 * height * width * model.layers)
        )  # fmt: skip
    vocab = model.padded_vocab // tp
    ends = 1 if model.tied else 2
    rows.append(
        ClassRow("router", len(model.moe_layers), (model.experts, model.hidden), 1, "BF16",
                 "whole on every rank", True, 2 * model.router_parameters)
    )  # fmt: skip
    rows.append(
        ClassRow("embedding" + (", lm_head" if ends == 2 else ""), ends, (vocab, model.hidden), 1,
                 "BF16", "rows", True, 2 * ends * vocab * model.hidden)
    )  # fmt: skip
    return RankPlan(tuple(rows), _mtp_bytes(model, rows), backend, tuple(explain(problem)))


def _experts(model: Model, ep: int, columns: AxisShard, padded: bool) -> list[ClassRow]:
    """Gate and up, then down; codes are 4 bits, scales BF16 (``srt/moe.py: create_weights``)."""
    group, count, hidden = model.spec.group_size, model.experts // ep, model.hidden
    layers = len(model.moe_layers)
    part = columns.aligned if padded else columns
    width, local = part.size, part.local_group
    matrices = layers * count
    up = matrices * 2 * width * (hidden // 2 + 2 * (hidden // group))
    down = matrices * hidden * (width // 2 + 2 * (width // local))
    fill = f", padded to {width}" if padded and width != columns.size else ""
    held = f"INT4 group {group}"
    if columns.local_group == group:
        cut, kept = "columns", held
    else:
        cut = "columns; scales repeated"
        kept = f"{held}→{columns.local_group}"
    whole = columns.size == columns.full_size
    return [
        ClassRow("experts gate, up", layers, (2 * columns.size, hidden), count, held,
                 ("whole" if whole else "rows") + fill, True, up),
        ClassRow("experts down", layers, (hidden, columns.size), count, kept,
                 ("whole" if whole else cut) + fill, columns.is_aligned, down),
    ]  # fmt: skip


def _linear(linear: Linear, model: Model, tp: int, gpu: Gpu) -> ClassRow:
    shard = linear.shard(tp - 1, tp, model.block)
    shape = (shard.height, shard.columns.size)
    elements = shape[0] * shape[1]
    plain = len(linear.layers) - linear.fp8
    name = f"{linear.kind} {linear.path.rpartition('.')[2]}"
    cut = {"none": "whole on every rank"}.get(linear.cut, "whole" if tp == 1 else linear.cut)
    scale_bytes = 4 * shard.scale_shape[0] * shard.scale_shape[1]
    if not linear.fp8:
        return ClassRow(name, plain, shape, 1, "BF16", cut, True, 2 * elements * plain)
    block = model.block if shard.divides else shard.block
    scales = f"FP8 {block[0]}×{block[1]}"
    weight_bytes = elements
    if not shard.divides:
        if gpu.device.keeps_fp8(linear.path, block):
            cut += f"; re-blocked from {model.block[0]}×{model.block[1]}"
        else:
            cut, scales = f"{cut}; re-blocked, then BF16", f"{scales}→BF16"
            weight_bytes = 2 * elements
    if plain:
        cut += f"; BF16 in {plain} layers"
    nbytes = linear.fp8 * (weight_bytes + scale_bytes) + plain * 2 * elements
    return ClassRow(name, len(linear.layers), shape, 1, scales, cut, shard.divides, nbytes)


def _mtp_bytes(model: Model, rows: list[ClassRow]) -> int:
    """One more layer of each kind that MoE layers have, and ``eh_proj`` (BF16, whole)."""
    per_layer = sum(
        row.nbytes // row.layers for row in rows if not row.name.startswith(("dense", "embedding"))
    )
    return model.mtp * (per_layer + 2 * 2 * model.hidden * model.hidden)


@dataclass(frozen=True)
class KvPlan:
    """The KV cache beside the weights.

    Attributes:
        bytes_per_token: on one rank, all layers.
        replicas: ranks that hold the same element.
        mem_fraction: ``--mem-fraction-static``.
        free_gib: memory of a rank left for the cache; negative when weights do not fit.
        tokens: that fit; every rank holds (its part of) the same ones.
    """

    bytes_per_token: int
    replicas: int
    mem_fraction: float
    free_gib: float
    tokens: int


def plan_kv(
    model: Model,
    tp: int,
    gpu: Gpu,
    weight_bytes: int,
    mem_fraction: float | None = None,
    kv_bytes: int = 2,
    draft_layers: int = 0,
) -> KvPlan:
    """Tokens that fit, as SGLang computes them.

    ``DefaultPoolConfigurator._compute_cell_size``: MLA stores latent and rotary part of every token
    whole on every rank, ``(kv_lora_rank + qk_rope_head_dim) · layers`` elements, and where there is
    a sparse-attention indexer its keys in FP8 with a float32 scale per 128; GQA stores
    ``max(1, kv_heads / tp)`` heads of keys and values. ``_profile_available_bytes``: what is free
    before the model loads, times ``mem_fraction_static``, less the weights.

    Args:
        model: the model.
        tp: tensor-parallel ranks.
        gpu: the card.
        weight_bytes: of the rank.
        mem_fraction: None for SGLang's default for this card and degree.
        kv_bytes: bytes of a cache element, 2 for BF16, 1 for FP8.
        draft_layers: MTP layers, whose cache is like the others'.
    """
    layers = model.layers + draft_layers
    if model.attention == "MLA":
        cell, replicas = model.kv_width * layers * kv_bytes, tp
        if model.index_head_dim:
            cell += (model.index_head_dim + model.index_head_dim // 128 * 4) * layers
    else:
        local_heads = max(1, model.kv_heads // tp)
        cell = local_heads * model.kv_width * layers * kv_bytes
        replicas = max(1, tp // model.kv_heads)
    fraction = default_mem_fraction(model, tp, gpu) if mem_fraction is None else mem_fraction
    free = (gpu.memory_gib - CONTEXT_GIB) * fraction * 2**30 - weight_bytes
    return KvPlan(cell, replicas, fraction, free / 2**30, max(0, int(free // cell)))


def default_mem_fraction(model: Model, tp: int, gpu: Gpu) -> float:
    """SGLang 0.5.16's own ``--mem-fraction-static``, to three digits.

    ``ServerArgs._handle_gpu_memory_settings``, no data-parallel attention, no DeepEP: 512 MiB, 1.5
    MiB for each token of a prefill chunk, ``tp / 8`` GiB, 2 MiB for each sequence of the largest
    CUDA graph, and for the prefill graphs 1.5 GiB (MLA) or 8 MiB each (others); at least 10 GiB on
    cards above 60 GiB.
    """
    mib = gpu.memory_mib
    chunk, graphs, most = next(
        (chunk, graphs, most if tp >= 4 else few)
        for limit_gib, chunk, graphs, few, most in _BY_MEMORY
        if mib < limit_gib * 1024
    )
    reserved = 512 + 1.5 * chunk + tp / 8 * 1024 + 2 * most
    reserved += 1536 if model.attention == "MLA" else 8 * graphs
    if mib > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return round((mib - reserved) / mib, 3)


# Below this many GiB: prefill chunk, how many prefill graphs that makes, largest decode graph
# below and from tp 4.
_BY_MEMORY = (
    (20, 2048, 42, 8, 8),
    (35, 2048, 42, 24, 80),
    (60, 4096, 50, 32, 160),
    (160, 8192, 58, 256, 512),
    (1 << 20, 16384, 74, 512, 512),
)
