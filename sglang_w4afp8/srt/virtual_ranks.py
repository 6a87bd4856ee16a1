"""Build and load SGLang's real layers as any rank of any layout, in one process.

Sharding goes wrong per rank and per shape, and shapes such as tp 32 need 32 processes to occur in
a server. SGLang's layers take their rank from a context that can be overridden for a scope; within
:func:`virtual_rank` a ``FusedMoE`` or a parallel linear is built and loaded as on that rank.
The partial outputs of all ranks must add up to the whole layer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from sglang_w4afp8.srt.loader import PROJECTIONS

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def virtual_rank(rank: int, tp_size: int, ep_size: int = 1) -> Iterator[None]:
    """Make this process look like tensor-parallel ``rank`` of ``tp_size`` while layers are built.

    Args:
        rank: 0 … tp_size − 1.
        tp_size: all ranks.
        ep_size: groups of experts among them; ``tp_size / ep_size`` ranks cut each expert.
    """
    from sglang.srt.runtime_context import get_context, get_parallel

    moe_tp_size = tp_size // ep_size
    layout = {
        "tp_size": tp_size,
        "tp_rank": rank,
        "moe_ep_size": ep_size,
        "moe_ep_rank": rank // moe_tp_size,
        "moe_tp_size": moe_tp_size,
        "moe_tp_rank": rank % moe_tp_size,
        "moe_dp_size": 1,
        "attn_tp_size": tp_size,
        "attn_tp_rank": rank,
    }
    with get_context().override_server_args(), get_parallel().override(**layout):
        yield


def load_experts(
    config: Any,
    tensors: Tensors,
    prefix: str,
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    **layer_options: Any,
) -> Any:
    """A ``FusedMoE``, or what the models build in its place, loaded as the current virtual rank.

    Args:
        config: a quantization config object.
        tensors: checkpoint tensors by name; those of ``prefix`` are loaded.
        prefix: ``model.layers.3.mlp.experts``.
        num_experts: experts of the whole layer.
        hidden_size: K.
        intermediate_size: N of the whole expert.
        top_k: experts per token.
        dtype: of the model.
        layer_options: further ``FusedMoE`` arguments.

    Returns:
        The layer, after ``process_weights_after_loading``.
    """
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class

    layer = get_moe_impl_class(config)(
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layer_id=0,
        top_k=top_k,
        params_dtype=dtype,
        quant_config=config,
        prefix=prefix,
        **layer_options,
    )
    load_tensors(layer, tensors, prefix)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def load_tensors(layer: Any, tensors: Tensors, prefix: str) -> None:
    """Hand a ``FusedMoE`` the tensors of ``prefix``, as the models' ``load_weights`` does."""
    parameters = dict(layer.named_parameters())
    shards = {projection: shard for shard, projection in PROJECTIONS.items()}
    for name, tensor in tensors.items():
        if not name.startswith(f"{prefix}."):
            continue
        expert, projection, kind = name.removeprefix(f"{prefix}.").split(".", 2)
        shard_id = shards.get(projection, projection)
        parameter = parameters[("w2_" if shard_id == "w2" else "w13_") + kind]
        parameter.weight_loader(parameter, tensor, name, shard_id=shard_id, expert_id=int(expert))


def run_experts(
    layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """This rank's partial output, ``(T, K)``; ``topk_ids`` are the checkpoint's."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    first = layer.moe_ep_rank * layer.num_local_experts
    local = topk_ids - first
    local = torch.where((local >= 0) & (local < layer.num_local_experts), local, -1)
    router_logits = x.new_zeros(x.shape[0], layer.num_experts)
    dispatched = StandardDispatchOutput(
        x, None, StandardTopKOutput(topk_weights, local, router_logits)
    )
    return layer.quant_method.apply(layer, dispatched).hidden_states


def load_linear(layer: torch.nn.Module, prefix: str, tensors: Tensors) -> torch.nn.Module:
    """Load a parallel linear that was built as the current virtual rank.

    Args:
        layer: a SGLang linear. Merged ones take ``gate_proj``/``up_proj`` or ``q_proj``/``k_proj``/
            ``v_proj`` tensors beside ``prefix``.
        prefix: its name in the model.
        tensors: checkpoint tensors by name.

    Returns:
        ``layer``, after ``process_weights_after_loading``.
    """
    parent, _, own = prefix.rpartition(".")
    parts: dict[str, int | str | None] = {
        "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
        "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    }.get(own, {own: None})
    parameters = dict(layer.named_parameters())
    for module, shard_id in parts.items():
        for kind, parameter in parameters.items():
            tensor = tensors[f"{parent}.{module}.{kind}"]
            arguments = (parameter, tensor) if shard_id is None else (parameter, tensor, shard_id)
            parameter.weight_loader(*arguments)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def load_mlp(
    config: Any,
    tensors: Tensors,
    prefix: str,
    *,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """A gated MLP's two parallel linears, built and, if there are tensors, loaded as this rank.

    Args:
        config: a quantization config object.
        tensors: checkpoint tensors by name; none leaves the linears as built.
        prefix: ``model.layers.0.mlp``.
        hidden_size: K.
        intermediate_size: N of the whole MLP.
        dtype: of the model.

    Returns:
        ``gate_up_proj`` and ``down_proj``, whose output is this rank's partial sum.
    """
    from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    common = {"bias": False, "quant_config": config, "params_dtype": dtype}
    gate_up = MergedColumnParallelLinear(
        hidden_size, [intermediate_size] * 2, prefix=f"{prefix}.gate_up_proj", **common
    )
    down = RowParallelLinear(
        intermediate_size, hidden_size, prefix=f"{prefix}.down_proj", reduce_results=False, **common
    )
    if tensors:
        load_linear(gate_up, f"{prefix}.gate_up_proj", tensors)
        load_linear(down, f"{prefix}.down_proj", tensors)
    return gate_up, down


def run_mlp(mlp: tuple[Any, Any], x: torch.Tensor) -> torch.Tensor:
    """This rank's partial output of :func:`load_mlp`'s linears, ``(T, K)``."""
    gate_up, down = mlp
    gate, up = gate_up.quant_method.apply(gate_up, x).chunk(2, dim=-1)
    return down.quant_method.apply(down, F.silu(gate) * up)
