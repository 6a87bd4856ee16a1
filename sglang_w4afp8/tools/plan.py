"""``sglang-w4afp8 plan MODEL --tp 32``: what every rank would hold, and whether it fits.

Reads a config.json and, where there are weights, their headers; needs neither a GPU nor SGLang. The
parts: :mod:`plan_source` finds the model, :mod:`plan_config` lists its matrices
(:mod:`plan_model`), :mod:`plan_ranks` cuts them as the loader does, :mod:`plan_stock` says what
SGLang alone would do, and :mod:`plan_scaling` estimates time per token.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

from sglang_w4afp8 import env
from sglang_w4afp8.errors import BackendError, ConfigError, ShardError
from sglang_w4afp8.tools.console import human_bytes, print_json
from sglang_w4afp8.tools.plan_gpus import GPUS, Gpu, find_gpu
from sglang_w4afp8.tools.plan_model import Model
from sglang_w4afp8.tools.plan_ranks import CONTEXT_GIB, KvPlan, RankPlan, plan_kv, plan_rank
from sglang_w4afp8.tools.plan_source import find_model
from sglang_w4afp8.tools.plan_stock import WORKS, Stock, stock_answer

KV_BYTES = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Layout:
    """What was asked for.

    Attributes:
        tp: tensor-parallel ranks.
        ep: expert-parallel groups among them.
        nnodes: machines.
        gpu: the card of each rank.
        kv_dtype: of the KV cache.
        mem_fraction: ``--mem-fraction-static``; None for SGLang's default.
        context: tokens of a sequence; None for the model's longest.
        mtp: whether MTP layers are loaded.
    """

    tp: int
    ep: int
    nnodes: int
    gpu: Gpu
    kv_dtype: str = "bf16"
    mem_fraction: float | None = None
    context: int | None = None
    mtp: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole answer.

    Attributes:
        model: what is planned.
        layout: as asked for.
        rank: the largest rank's tensors.
        kv: the cache beside them.
        stock: what SGLang alone would do.
        degrees: tensor-parallel degrees that can be cut at this ``ep``.
        stock_degrees: those of them that SGLang alone serves right on this card.
        smallest_fit: the smallest of ``degrees`` that leaves room for one sequence; None if none.
    """

    model: Model
    layout: Layout
    rank: RankPlan
    kv: KvPlan
    stock: Stock
    degrees: tuple[int, ...]
    stock_degrees: tuple[int, ...]
    smallest_fit: int | None

    @property
    def weight_bytes(self) -> int:
        """Weights of a rank, with MTP if it was asked for."""
        return self.rank.nbytes + (self.rank.mtp_bytes if self.layout.mtp else 0)

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.layout.context or self.model.context

    @property
    def fits(self) -> bool:
        """Whether weights and one sequence fit."""
        return self.kv.tokens >= self.context


def make_plan(model: Model, layout: Layout) -> Plan:
    """Plan a model at a layout.

    Raises:
        ShardError: it cannot be cut that way.
        BackendError: a forced backend cannot run the experts.
    """
    degrees = model.degrees(layout.ep)
    try:
        rank = plan_rank(model, layout.tp, layout.ep, layout.gpu)
    except ShardError as error:
        nearest = sorted(degrees, key=lambda tp: abs(tp - layout.tp))[:2]
        ways = [f"--tp {tp}" for tp in nearest]
        raise ShardError(error.found, error.why, ways or list(error.ways)) from None
    smallest = next((tp for tp in degrees if _fits(model, replace(layout, tp=tp))), None)
    return Plan(
        model=model,
        layout=layout,
        rank=rank,
        kv=_kv(model, layout, rank),
        stock=stock_answer(model, layout.tp, layout.ep, layout.gpu),
        degrees=tuple(degrees),
        stock_degrees=tuple(
            tp for tp in degrees if stock_answer(model, tp, layout.ep, layout.gpu).verdict == WORKS
        ),
        smallest_fit=smallest,
    )


def _fits(model: Model, layout: Layout) -> bool:
    """Whether a layout leaves room for one sequence; a forced backend may rule it out."""
    try:
        return _kv(model, layout).tokens >= (layout.context or model.context)
    except BackendError:
        return False


def _kv(model: Model, layout: Layout, rank: RankPlan | None = None) -> KvPlan:
    rank = rank or plan_rank(model, layout.tp, layout.ep, layout.gpu)
    weights = rank.nbytes + (rank.mtp_bytes if layout.mtp else 0)
    draft = model.mtp if layout.mtp else 0
    return plan_kv(
        model, layout.tp, layout.gpu, weights, layout.mem_fraction, KV_BYTES[layout.kv_dtype], draft
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="checkpoint folder, config.json, or a name like DeepSeek-R1")
    parser.add_argument("--tp", type=int, default=8, help="tensor-parallel ranks (default 8)")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel groups (default 1)")
    parser.add_argument("--nnodes", type=int, help="machines (default: 8 ranks on each)")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default h100)")
    parser.add_argument("--gpu-memory-gib", type=float, help="memory of a card like --gpu")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: the longest)")
    parser.add_argument("--kv-dtype", choices=sorted(KV_BYTES), default="bf16")
    parser.add_argument("--mem-fraction", type=float, help="--mem-fraction-static of the server")
    parser.add_argument("--mtp", action="store_true", help="count the MTP layers")
    parser.add_argument(
        "--scaling", action="store_true", help="estimated time per token at TP 8 … 64 instead"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 when it does not fit or the checkpoint has a problem."""
    model = find_model(args.model)
    override = env.ACTIVATION.get()
    model = replace(model, spec=model.spec.with_activation_override(override))
    gpu = find_gpu(args.gpu, args.gpu_memory_gib)
    if args.scaling:
        from sglang_w4afp8.tools.plan_scaling import run_scaling

        return run_scaling(model, gpu, as_json=args.json)
    plan = make_plan(model, layout_of(args, gpu))
    if args.json:
        print_json(as_document(plan))
    else:
        print("\n".join(as_text(plan)))
    return 0 if plan.fits and not model.problems else 1


def layout_of(args: argparse.Namespace, gpu: Gpu) -> Layout:
    """Check the options and put them together.

    Raises:
        ConfigError: numbers that make no layout.
    """
    nnodes = args.nnodes or max(1, args.tp // 8)
    for name, value in (("--tp", args.tp), ("--nnodes", nnodes), ("--context", args.context or 1)):
        if value < 1:
            raise ConfigError(f"{name} {value}", "it must be positive", [f"{name} 8"])
    if args.tp % nnodes:
        raise ConfigError(
            f"--tp {args.tp} --nnodes {nnodes}",
            "every machine runs the same number of ranks",
            [f"--nnodes {d}" for d in range(1, args.tp + 1) if args.tp % d == 0][:4],
        )
    return Layout(
        args.tp, args.ep, nnodes, gpu, args.kv_dtype, args.mem_fraction, args.context, args.mtp
    )


def as_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes."""
    model, layout, kv = plan.model, plan.layout, plan.kv
    return {
        "model": {
            "name": model.name,
            "source": model.source,
            "model_type": model.model_type,
            "attention": model.attention,
            "layers": model.layers,
            "experts": model.experts,
            "parameters": model.parameters,
            "group_size": model.spec.group_size,
            "weight_block_size": model.spec.weight_block_size,
            "moe_activation": str(model.spec.moe_activation),
            "notes": model.notes,
            "problems": model.problems,
        },
        "layout": {**asdict(layout), "gpu": asdict(layout.gpu)},
        "rank": {
            "classes": [asdict(row) for row in plan.rank.rows],
            "weight_bytes": plan.weight_bytes,
            "mtp_bytes": plan.rank.mtp_bytes,
        },
        "backend": {
            "chosen": plan.rank.backend,
            "reasons": {verdict.backend: verdict.reason for verdict in plan.rank.verdicts},
        },
        "kv": {**asdict(kv), "context": plan.context, "sequences": kv.tokens // plan.context},
        "fits": plan.fits,
        "tp_degrees": plan.degrees,
        "largest_tp": plan.degrees[-1],
        "smallest_tp_that_fits": plan.smallest_fit,
        "stock_sglang": {**asdict(plan.stock), "tp_degrees": plan.stock_degrees},
    }


def as_text(plan: Plan) -> list[str]:
    """One screen."""
    model, layout = plan.model, plan.layout
    moe = f"{model.experts} experts of {model.expert_width}, top-{model.top_k}"
    ranks = f"{layout.nnodes} × {layout.tp // layout.nnodes} {layout.gpu.title}"
    lines = [
        f"{model.name} ({model.source}): {model.parameters / 1e9:.0f} B parameters, "
        f"{model.layers} layers, {moe}, {model.attention}",
        f"tp {layout.tp}, ep {layout.ep} on {ranks}: INT4 group {model.spec.group_size}, "
        f"{model.spec.moe_activation} activations",
        *(f"note: {note}" for note in model.notes),
        "",
        f"{'one rank':<31} {'layers':>6}  {'shape':<19} {'one scale for':<19} {'bytes':>9}  cut",
    ]
    for row in plan.rank.rows:
        shape = " × ".join(str(n) for n in row.local_shape)
        shape = f"{row.copies} × {shape}" if row.copies > 1 else shape
        lines.append(
            f"{row.name:<31} {row.layers:>6}  {shape:<19} {row.scales:<19} "
            f"{human_bytes(row.nbytes):>9}  {row.cut}"
        )
    total = f"{'weights of a rank':<31} {'':>6}  {'':<19} {'':<19}"
    lines.append(f"{total} {human_bytes(plan.rank.nbytes):>9}")
    if model.mtp:
        counted = "counted below" if layout.mtp else "not counted, see --mtp"
        lines.append(
            f"{'MTP layer, when served':<31} {model.mtp:>6}  {'':<19} {'':<19} "
            f"{human_bytes(plan.rank.mtp_bytes):>9}  {counted}"
        )
    return [*lines, "", *_backend_text(plan), *_kv_text(plan), *_degree_text(plan),
            *_stock_text(plan), *_problem_text(model)]  # fmt: skip


def _entry(title: str, *texts: str) -> list[str]:
    """``title`` in a column of its own, one line a text."""
    return [f"{title if not i else '':<9} {text}" for i, text in enumerate(texts)]


def _backend_text(plan: Plan) -> list[str]:
    chosen = plan.rank.backend
    against = [f"not {v.backend}: {v.reason}" for v in plan.rank.verdicts if v.reason]
    slow = " (the reference: right, not for production traffic)" if chosen == "torch" else ""
    return _entry("backend", f"{chosen}{slow}", *against)


def _kv_text(plan: Plan) -> list[str]:
    kv, layout, gpu = plan.kv, plan.layout, plan.layout.gpu
    copies = {1: "cut over the ranks", layout.tp: "the same on every rank"}.get(
        kv.replicas, f"the same on {kv.replicas} ranks"
    )
    origin = "as given" if layout.mem_fraction is not None else "SGLang's default here"
    basis = (
        f"{gpu.memory_gib:.1f} GiB, about {CONTEXT_GIB:.0f} GiB of it for CUDA and NCCL, "
        f"--mem-fraction-static {kv.mem_fraction:.3f} ({origin})"
    )
    if kv.free_gib <= 0:
        return _entry("KV cache", f"none: the weights are {-kv.free_gib:.1f} GiB too large", basis)
    sequences = f"{kv.tokens // plan.context} of {plan.context} tokens"
    each = f"{layout.kv_dtype}, {kv.bytes_per_token} bytes each on a rank, {copies}"
    return _entry(
        "KV cache",
        f"{kv.tokens} tokens ({each}) = {sequences}",
        f"{kv.free_gib:.1f} GiB: {basis}",
    )


def _degree_text(plan: Plan) -> list[str]:
    def listed(degrees: tuple[int, ...]) -> str:
        return " ".join(map(str, degrees)) or "none"

    fit = (
        f"; weights and {plan.context} tokens fit from {plan.smallest_fit}"
        if plan.smallest_fit
        else f"; weights and {plan.context} tokens fit at none of them"
    )
    return _entry(
        "TP", f"can be cut at {listed(plan.degrees)}{fit}",
        f"SGLang alone on this card: {listed(plan.stock_degrees)}",
    )  # fmt: skip


def _stock_text(plan: Plan) -> list[str]:
    verdict, reasons = plan.stock.verdict, plan.stock.reasons
    if verdict == WORKS:
        return _entry("SGLang", "the same command without this package: works")
    later = len(reasons) - 2
    shown = [reasons[0], *(f"then: {reason}" for reason in reasons[-1:] if later >= 0)]
    if later > 0:
        shown.insert(1, f"then: {later} more, see --json")
    return _entry("SGLang", f"the same command without this package: {verdict}", *shown)


def _problem_text(model: Model) -> list[str]:
    return ["", "Problems:", *(f"  - {text}" for text in model.problems)] if model.problems else []
