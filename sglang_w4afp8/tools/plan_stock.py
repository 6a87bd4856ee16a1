"""What SGLang without this package does with a command: works, refuses, or is silently wrong.

The rules are those of SGLang 0.5.16 … 0.5.23, in the order in which a server meets them:

0. ``ModelConfig._verify_quantization``: the checkpoint's method is another than ``w4afp8``;
1. ``check_quantized_moe_compatibility`` (``moe_ep_setup.py``), only where config.json names a
   ``weight_block_size``;
2. the loader's compute-capability gate (``model_loader/loader.py``; ``W4AFp8Config`` wants 9.0);
3. layer by layer: ``Fp8LinearMethod.validate_block_quant_shapes`` (``quantization/fp8.py``);
4. while loading: ``W4AFp8Config`` drops group size, skip list, block size and activation scheme and
   takes 128, none, 128 × 128 and static (``quantization/w4afp8.py``), so BF16 linears, other
   groups and other blocks meet parameters of another dtype or shape;
5. with nothing said: ``FusedMoE._load_w2`` cuts scale columns by integer division.

``tests/integration/test_plan_stock.py`` compares them with SGLang's real layers and loaders.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_w4afp8.sharding import AxisShard, LinearShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.tools.plan_gpus import Gpu
from sglang_w4afp8.tools.plan_model import Linear, Model

WORKS, REFUSES, WRONG = "works", "refuses", "silently wrong"
STOCK_BLOCK = STOCK_GROUP = 128


@dataclass(frozen=True)
class Stock:
    """SGLang's own answer.

    Attributes:
        verdict: :data:`WORKS`, :data:`REFUSES` or :data:`WRONG`.
        reasons: what stops it first, or what goes wrong; then what would come next.
    """

    verdict: str
    reasons: tuple[str, ...]


def stock_answer(model: Model, tp: int, ep: int, gpu: Gpu | None) -> Stock:
    """Apply the rules; ``gpu`` None leaves the card out. The layout must pass ``Model.check``."""
    refusals = [*_before_loading(model, tp, ep, gpu), *_linear_refusals(model, tp)]
    wrongs = _silent(model, tp, ep)
    refusals += _while_loading(model)
    if refusals:
        return Stock(REFUSES, (*refusals, *wrongs))
    return Stock(WRONG if wrongs else WORKS, tuple(wrongs))


def _before_loading(model: Model, tp: int, ep: int, gpu: Gpu | None) -> list[str]:
    found = []
    if model.quant_method and not model.is_w4afp8:
        found.append(
            f"Quantization method specified in the model config ({model.quant_method}) does not "
            "match the quantization method specified in the `quantization` argument (w4afp8)."
        )
    columns = model.expert_width // (tp // ep)
    if model.states_block and columns % model.block[0]:
        found.append(
            f"For quantized MoE models, please make sure (moe_intermediate_size="
            f"{model.expert_width} / moe_tp_size={tp // ep}) % weight_block_size_n="
            f"{model.block[0]} == 0"
        )
    if gpu is not None and gpu.capability < (9, 0):
        major, minor = gpu.capability
        found.append(
            "The quantization method w4afp8 is not supported for the current GPU. Minimum "
            f"capability: 90. Current capability: {10 * major + minor}."
        )
    return found


def _linear_refusals(model: Model, tp: int) -> list[str]:
    """``validate_block_quant_shapes`` for every linear, in the order of the layers, once each."""
    found: dict[str, str] = {}
    for linear in sorted(model.linears, key=lambda x: x.layers.start):
        if linear.path.endswith("indexer.weights_proj"):
            continue  # made without a quantization config
        refusal = block_refusal(linear, tp)
        if refusal:
            found.setdefault(refusal, linear.path)
    return [f"{path}: {message}" for message, path in found.items()]


def block_refusal(linear: Linear, tp: int) -> str | None:
    """What ``validate_block_quant_shapes`` raises for one linear, None if it lets it pass.

    SGLang has the same check for what is cut along K, for what is cut along N, and for outputs that
    are merged, cut or not.
    """
    shard = linear.shard(0, tp, (STOCK_BLOCK, STOCK_BLOCK))
    if linear.cut == "columns" and tp > 1 and shard.columns.size % STOCK_BLOCK:
        return (
            f"Weight input_size_per_partition = {shard.columns.size} is not divisible by weight "
            f"quantization block_k = {STOCK_BLOCK}."
        )
    if (linear.cut == "rows" and tp > 1) or len(linear.rows) > 1:
        return _row_refusal(shard)
    return None


def _row_refusal(shard: LinearShard) -> str | None:
    for rows in shard.rows:
        if rows.size % STOCK_BLOCK:
            return (
                f"Weight output_partition_size = {rows.size} is not divisible by weight "
                f"quantization block_n = {STOCK_BLOCK}."
            )
    return None


def _while_loading(model: Model) -> list[str]:
    found = []
    plain = [x.path for x in model.linears if x.fp8 < len(x.layers) and x.kind != "indexer"]
    if plain:
        found.append(
            f"loading {plain[0]}: Downcasting not allowed: target.dtype=torch.float8_e4m3fn, "
            "loaded_weight.dtype=torch.bfloat16"
        )
    if model.block != (STOCK_BLOCK, STOCK_BLOCK):
        found.append(
            f"loading linears: FP8 scales per {model.block[0]}×{model.block[1]} do not fit "
            f"parameters made for {STOCK_BLOCK}×{STOCK_BLOCK}"
        )
    if model.spec.group_size != STOCK_GROUP:
        found.append(
            f"loading experts: group scales of {model.spec.group_size} do not fit parameters made "
            f"for {STOCK_GROUP}"
        )
    return found


def lost_columns(width: int, tp: int) -> tuple[int, int]:
    """Scale columns of down that SGLang's loader keeps, and that the worst rank needs.

    Args:
        width: the experts' intermediate size.
        tp: ranks that cut an expert.
    """
    shards = [AxisShard.even(width, STOCK_GROUP, rank, tp) for rank in range(tp)]
    return shards[0].size // STOCK_GROUP, max(shard.covering_columns for shard in shards)


def _silent(model: Model, tp: int, ep: int) -> list[str]:
    found = []
    held, needed = lost_columns(model.expert_width, tp // ep)
    if held < needed:
        found.append(f"experts' down_proj: loads {held} of {needed} scale columns, no message")
    if model.spec.moe_activation is not ActivationScheme.STATIC:
        found.append("no dynamic activation scales: it takes 1.0 for every input scale")
    return found
