"""Random layers as a checkpoint stores them, random routing, and one number for how far off.

For tests of this package and of whatever runs these layers: W4AFP8 experts, block-FP8 linears, and
inputs with the kinds of routing that find different bugs. Everything is on the CPU and depends on
its seed alone, so a failing case can be named by its arguments. The answers to compare with are
:func:`sglang_w4afp8.reference.moe_reference` and, for a MLP, :func:`fp8_mlp_reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import INT4_MAX, INT4_MIN, pack_int4
from sglang_w4afp8.reference import dequantize_fp8_block

EXPERTS_PREFIX = "model.layers.1.mlp.experts"
FP8_BLOCK = (128, 128)

Tensors = Mapping[str, torch.Tensor]
Seed = int | torch.Generator
"""A number, or a generator to go on drawing from."""


def calc_diff(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two tensors are apart: ``1 − 2·Σxy / Σ(x² + y²)``, in float64.

    The measure is the one DeepGEMM's tests use. It is 0 for equal tensors, 1 for orthogonal ones, 2
    for opposite ones, and about half the squared relative error for close ones. It is evaluated as
    ``Σ(x − y)² / Σ(x² + y²)``, which is the same and does not cancel.

    Args:
        actual: any shape, dtype and device.
        expected: of the same shape.

    Returns:
        0 … 2; 0 if both are all zero or empty. Infinity if either holds a NaN or an infinity, so
        that no comparison with a bound, whichever way around, lets it pass.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    if not actual.numel():
        return 0.0
    pair = torch.stack([actual.detach().double(), expected.detach().to(actual.device).double()])
    largest = pair.abs().amax()
    if not largest.isfinite():
        return float("inf")
    if largest == 0:
        return 0.0
    x, y = pair / largest  # squares of float64 extremes would overflow or vanish
    return float((x - y).square().sum() / (x.square() + y.square()).sum())


@dataclass(frozen=True)
class ScaleRange:
    """Where random weight scales are drawn from, evenly: ``low`` … ``low + width``.

    Attributes:
        width: of the range. A narrow one hides a scale that has met a neighbour's weight.
        low: its lower end.
        per_root_k: divide by √K, so that outputs do not grow with a layer's width.
    """

    width: float = 0.02
    low: float = 0.001
    per_root_k: bool = False

    def draw(self, rows: int, groups: int, k: int, generator: torch.Generator) -> torch.Tensor:
        """``(rows, groups)`` float32 scales of a weight with K = ``k``."""
        scales = torch.rand(rows, groups, generator=generator) * self.width + self.low
        return scales / k**0.5 if self.per_root_k else scales


INT4_UNIT = ScaleRange(0.25, 0.125, per_root_k=True)
"""For INT4 codes: an input of size 1 gives an output of about size 1."""
FP8_UNIT = ScaleRange(1.0, 0.5, per_root_k=True)
"""The same for the FP8 weights below."""


@dataclass(frozen=True)
class ExpertShape:
    """A whole MoE layer's sizes.

    Attributes:
        experts: E.
        hidden: K, input and output.
        intermediate: N of the whole expert.
        group: INT4 codes per scale.
    """

    experts: int
    hidden: int
    intermediate: int
    group: int = 128

    def __post_init__(self) -> None:
        if self.hidden % self.group or self.intermediate % self.group:
            raise ValueError(f"{self}: groups do not divide both sizes")

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Projection -> ``(rows, columns)`` of its weight, unpacked."""
        return _mlp_projections(self.hidden, self.intermediate)


def _mlp_projections(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def _generator(seed: Seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


# --------------------------------------------------------------------------------------- experts


def expert_tensors(
    shape: ExpertShape,
    prefix: str = EXPERTS_PREFIX,
    *,
    seed: Seed = 0,
    scales: ScaleRange | None = None,
    input_scale: float | None = None,
    lowest_code: int = INT4_MIN,
) -> dict[str, torch.Tensor]:
    """The experts of a layer, tensor by tensor.

    Args:
        shape: sizes.
        prefix: what comes before ``.{expert}.{projection}.{kind}``.
        seed: of codes and scales.
        scales: range of the weight scales.
        input_scale: every projection's static activation scale; None for a checkpoint without.
        lowest_code: −7 for weights without the code −8, which some kernels treat apart.

    Returns:
        For each expert and projection of ``(N, K)``: ``weight`` ``(N, K/2)`` int8,
        ``weight_scale_inv`` ``(N, K/group)`` bfloat16, and perhaps ``input_scale`` ``(1,)``
        float32.
    """
    generator = _generator(seed)
    scales = scales or ScaleRange()
    tensors = {}
    for expert in range(shape.experts):
        for projection, (n, k) in shape.projections.items():
            name = f"{prefix}.{expert}.{projection}"
            codes = torch.randint(lowest_code, INT4_MAX + 1, (n, k), generator=generator)
            tensors[f"{name}.weight"] = pack_int4(codes)
            drawn = scales.draw(n, k // shape.group, k, generator)
            tensors[f"{name}.weight_scale_inv"] = drawn.bfloat16()
            if input_scale is not None:
                tensors[f"{name}.input_scale"] = torch.tensor([input_scale])
    return tensors


def whole_weights(tensors: Tensors, prefix: str = EXPERTS_PREFIX, group: int = 128) -> MoEWeights:
    """All experts under ``prefix`` as one layer, uncut, on the device where the tensors are.

    Args:
        tensors: by checkpoint name; those of other modules are ignored.
        prefix: of the experts.
        group: INT4 codes per scale.

    Returns:
        In checkpoint order. Input scales, if there are any, are the largest of all experts, as
        SGLang takes them.
    """
    own = [name.removeprefix(f"{prefix}.") for name in tensors if name.startswith(f"{prefix}.")]
    experts = range(1 + max(int(name.split(".")[0]) for name in own))

    def stacked(projection: str, kind: str) -> torch.Tensor:
        return torch.stack([tensors[f"{prefix}.{e}.{projection}.{kind}"] for e in experts])

    def merged(kind: str) -> torch.Tensor:
        return torch.cat([stacked("gate_proj", kind), stacked("up_proj", kind)], dim=1)

    static = any(name.endswith(".input_scale") for name in own)
    return MoEWeights(
        merged("weight"),
        merged("weight_scale_inv"),
        stacked("down_proj", "weight"),
        stacked("down_proj", "weight_scale_inv"),
        group,
        group,
        merged("input_scale").amax().reshape(1) if static else None,
        stacked("down_proj", "input_scale").amax().reshape(1) if static else None,
    )


# --------------------------------------------------------------------------------------- routing


class Routing(NamedTuple):
    """What a MoE layer is called with, after the router.

    Attributes:
        x: ``(T, K)`` hidden states.
        topk_weights: ``(T, top_k)`` float32, 0 … 1, not normalised.
        topk_ids: ``(T, top_k)`` int32; −1 is no expert.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    def to(self, device: str | torch.device) -> Routing:
        """All three on another device."""
        return Routing(*(tensor.to(device) for tensor in self))


def random_routing(
    tokens: int,
    shape: ExpertShape,
    top_k: int,
    *,
    kind: Literal["uniform", "zipf", "one"] = "uniform",
    absent: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: Seed = 0,
) -> Routing:
    """Random hidden states and random choices.

    Args:
        tokens: T, may be 0.
        shape: of the layer.
        top_k: experts per token.
        kind: ``uniform``: distinct experts, all equally likely. ``zipf``: distinct experts, the
            chance of the r-th most popular ∝ 1/r. ``one``: a single expert in every slot of every
            token; no router does that, and no expert can get more work.
        absent: share of the ids that are −1 instead, as where an expert lives on another rank.
        dtype: of the hidden states.
        seed: of everything.
    """
    generator = _generator(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
    if kind == "uniform":
        ids = torch.zeros(tokens, top_k, dtype=torch.int32)
        for token in range(tokens):
            ids[token] = torch.randperm(shape.experts, generator=generator)[:top_k]
    elif kind == "zipf":
        rank = torch.randperm(shape.experts, generator=generator) + 1
        # A race: the time of the r-th is exponential with mean r, so its chance to win is ∝ 1/r.
        times = torch.rand(tokens, shape.experts, generator=generator).log().neg() * rank
        ids = times.topk(top_k, dim=-1, largest=False).indices.int()
    else:
        chosen = int(torch.randint(shape.experts, (1,), generator=generator))
        ids = torch.full((tokens, top_k), chosen, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    if absent:
        ids[torch.rand(tokens, top_k, generator=generator) < absent] = -1
    return Routing(x, weights, ids)


# ------------------------------------------------------------------------------ block-FP8 linears


def fp8_linear_tensors(
    name: str, rows: int, columns: int, *, seed: Seed = 0, scales: ScaleRange | None = None
) -> dict[str, torch.Tensor]:
    """One linear in DeepSeek's block-FP8; last blocks may be partial.

    Args:
        name: of the module.
        rows: N.
        columns: K.
        seed: of values and scales.
        scales: range of the block scales.

    Returns:
        ``weight`` ``(N, K)`` float8_e4m3fn and ``weight_scale_inv`` ``(ceil(N/128), ceil(K/128))``
        float32.
    """
    generator = _generator(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    grid = -(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1])
    drawn = (scales or ScaleRange()).draw(*grid, columns, generator)
    return {f"{name}.weight": weight, f"{name}.weight_scale_inv": drawn}


def fp8_mlp_tensors(
    prefix: str,
    hidden: int,
    intermediate: int,
    *,
    seed: Seed = 0,
    scales: ScaleRange | None = None,
) -> dict[str, torch.Tensor]:
    """``gate_proj``, ``up_proj`` and ``down_proj`` of a MLP, see :func:`fp8_linear_tensors`."""
    generator = _generator(seed)
    tensors = {}
    for projection, (n, k) in _mlp_projections(hidden, intermediate).items():
        name = f"{prefix}.{projection}"
        tensors.update(fp8_linear_tensors(name, n, k, seed=generator, scales=scales))
    return tensors


def fp8_dense(tensors: Tensors, name: str) -> torch.Tensor:
    """A linear's ``(N, K)`` weight in float64."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    return dequantize_fp8_block(weight, scale, FP8_BLOCK, torch.float64)


def fp8_mlp_reference(x: torch.Tensor, tensors: Tensors, prefix: str) -> torch.Tensor:
    """``down(silu(gate(x)) · up(x))`` in float64 with unrounded activations, on ``x``'s device."""
    gate, up, down = (
        fp8_dense(tensors, f"{prefix}.{projection}").to(x.device)
        for projection in _mlp_projections(0, 0)
    )
    inner = F.silu(x.double() @ gate.T) * (x.double() @ up.T)
    return inner @ down.T
