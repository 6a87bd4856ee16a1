"""Load a checkpoint's layers as every rank of a layout and add the parts up.

``python -m sglang_w4afp8.srt.shard_check MODEL --tp 8 16 32`` takes one MoE layer, one shared
expert and one dense MLP of a W4AFP8 checkpoint through SGLang's real layers and loaders, as each
rank in turn, and compares the sum of the partial outputs with the whole layer computed by the
float64 oracle. Beside each row it says what SGLang's own method does with the same shard. It needs
no GPU and reads only the tensors it uses.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sglang_w4afp8.checkpoint.index import open_index
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.reference import dequantize_fp8_block, moe_reference
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.srt.virtual_ranks import (
    load_experts,
    load_mlp,
    run_experts,
    run_mlp,
    virtual_rank,
)

TOKENS = 8
TOLERANCE = 1e-5
"""Largest accepted error relative to the output's largest element: float32 sums, reordered."""


@dataclass(frozen=True)
class Row:
    """One layer at one layout.

    Attributes:
        layer: the module's name.
        tp: tensor-parallel ranks.
        ep: expert-parallel groups among them.
        columns: intermediate columns a rank.
        local_group: elements per scale on a rank, along the cut axis.
        error: largest difference between the ranks' sum and the whole, relative to its largest
            element.
        stock: what SGLang's own method does with this shard.
    """

    layer: str
    tp: int
    ep: int
    columns: int
    local_group: int
    error: float
    stock: str

    @property
    def passed(self) -> bool:
        """Whether the parts are the whole."""
        return self.error <= TOLERANCE


class Checkpoint:
    """The tensors of a local checkpoint folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        # Not strict: files that no checked layer lies in may be missing.
        self.index = open_index(folder, strict=False)
        self.config = self.index.config
        self.spec = QuantSpec.from_dict(self.config.get("quantization_config", {}))

    def modules(self, pattern: str) -> list[str]:
        """Module names matching ``pattern`` (which captures the name), in layer order."""
        found = {match[1] for entry in self.index if (match := re.match(pattern, entry.name))}
        return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose name starts with ``prefix.``."""
        wanted = [entry for entry in self.index if entry.name.startswith(f"{prefix}.")]
        with TensorReader(self.index.root) as reader:
            return {entry.name: reader.read(entry) for entry in wanted}


def check(folder: Path, tp_sizes: list[int], ep_sizes: list[int]) -> Iterator[Row]:
    """Rows for the first MoE layer, its shared expert and the first dense MLP, where they exist."""
    checkpoint = Checkpoint(folder)
    experts = checkpoint.modules(r"(.*\.mlp\.experts)\.0\.")
    shared = checkpoint.modules(r"(.*\.mlp\.shared_experts)\.")
    dense = checkpoint.modules(r"(.*\.layers\.\d+\.mlp)\.gate_proj\.weight_scale_inv$")
    for tp in tp_sizes:
        for ep in ep_sizes:
            if experts and tp % ep == 0:
                yield check_experts(checkpoint, experts[0], tp, ep)
        for name in (shared[:1] if shared else []) + dense[:1]:
            yield check_mlp(checkpoint, name, tp)


def check_experts(checkpoint: Checkpoint, prefix: str, tp: int, ep: int) -> Row:
    """Run a MoE layer as every rank and compare with the oracle."""
    tensors = checkpoint.under(prefix)
    count = 1 + max(int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in tensors)
    whole = _whole_layer(tensors, prefix, count, checkpoint.spec.group_size)
    hidden = whole.hidden_size
    intermediate = whole.w2.shape[-1] * 2
    top_k = min(checkpoint.config.get("num_experts_per_tok", 2), count)
    sizes = {
        "num_experts": count,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "top_k": top_k,
    }
    x, weights, ids = _routing(hidden, count, top_k)
    expected = moe_reference(x, whole, weights, ids, scheme=ActivationScheme.NONE)
    total = torch.zeros_like(expected)
    for rank in range(tp):
        with virtual_rank(rank, tp, ep):
            layer = load_experts(_config(checkpoint), tensors, prefix, **sizes)
            total += run_experts(layer, x, weights, ids)
    columns = AxisShard.even(intermediate, checkpoint.spec.group_size, tp // ep - 1, tp // ep)
    return Row(
        prefix, tp, ep, columns.size, columns.local_group, _error(total, expected),
        _stock_experts(tensors, prefix, sizes, tp, ep),
    )  # fmt: skip


def check_mlp(checkpoint: Checkpoint, prefix: str, tp: int) -> Row:
    """Run a block-FP8 MLP (gate_up_proj, down_proj) as every rank and compare with the whole."""
    tensors = checkpoint.under(prefix)
    block = checkpoint.spec.weight_block_size or (128, 128)
    gate, up, down = (
        dequantize_fp8_block(
            tensors[f"{prefix}.{name}.weight"],
            tensors[f"{prefix}.{name}.weight_scale_inv"],
            block,
            torch.float64,
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    intermediate, hidden = gate.shape
    x = torch.randn(TOKENS, hidden, generator=torch.Generator().manual_seed(1))
    expected = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    total = torch.zeros_like(expected)
    for rank in range(tp):
        with virtual_rank(rank, tp):
            sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
            total += run_mlp(load_mlp(_config(checkpoint), tensors, prefix, **sizes), x)
    columns = AxisShard.even(intermediate, block[0], tp - 1, tp)
    return Row(
        prefix, tp, 1, columns.size, columns.local_group, _error(total, expected),
        _stock_mlp(prefix, hidden, intermediate, tp),
    )  # fmt: skip


def _stock_experts(
    tensors: dict[str, torch.Tensor], prefix: str, sizes: dict[str, int], tp: int, ep: int
) -> str:
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    try:
        with virtual_rank(tp - 1, tp, ep):
            layer = load_experts(W4AFp8Config(), tensors, prefix, dtype=torch.bfloat16, **sizes)
    except Exception as error:
        return f"refuses: {_one_line(error)}"
    columns = AxisShard.even(sizes["intermediate_size"], 128, tp // ep - 1, tp // ep)
    local_experts = layer.w2_weight.shape[0]
    held = layer.w2_weight_scale_inv.numel() // (local_experts * sizes["hidden_size"])
    needed = columns.aligned.size // 128
    if held < needed:
        return f"silently wrong: {held} of {needed} scale columns"
    return "works"


def _stock_mlp(prefix: str, hidden: int, intermediate: int, tp: int) -> str:
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    try:
        with virtual_rank(tp - 1, tp):
            sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
            load_mlp(W4AFp8Config(), {}, prefix, **sizes)
    except Exception as error:
        return f"refuses: {_one_line(error)}"
    return "works"


def _config(checkpoint: Checkpoint) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    return ShardedW4AFp8Config(checkpoint.spec)


def _whole_layer(
    tensors: dict[str, torch.Tensor], prefix: str, count: int, group: int
) -> MoEWeights:
    def stacked(projection: str, kind: str) -> torch.Tensor:
        return torch.stack([tensors[f"{prefix}.{e}.{projection}.{kind}"] for e in range(count)])

    def merged(kind: str) -> torch.Tensor:
        return torch.cat([stacked("gate_proj", kind), stacked("up_proj", kind)], dim=1)

    down, scale = (stacked("down_proj", kind) for kind in ("weight", "weight_scale_inv"))
    return MoEWeights(merged("weight"), merged("weight_scale_inv"), down, scale, group, group)


def _routing(hidden: int, experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator)
    chosen = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(TOKENS)]
    return x, torch.rand(TOKENS, top_k, generator=generator), torch.stack(chosen).int()


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 when all parts add up, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m sglang_w4afp8.srt.shard_check")
    parser.add_argument("model", type=Path, help="a W4AFP8 checkpoint folder")
    parser.add_argument("--tp", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--ep", type=int, nargs="+", default=[1])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args(argv)
    # Weights against weights: FP8 rounding of activations would hide an error in a scale.
    os.environ["SGLANG_W4AFP8_ACTIVATION"] = "none"
    from sglang_w4afp8.srt import cpu_fp8

    cpu_fp8.install()
    # Upstream's half sentence at each construction of its config would drown the table.
    logging.getLogger("sglang.srt.layers.quantization.w4afp8").setLevel(logging.ERROR)
    failed = False
    for row in check(args.model, args.tp, args.ep):
        failed |= not row.passed
        if args.json:
            print(json.dumps(asdict(row) | {"passed": row.passed}), flush=True)
        else:
            verdict = "ok  " if row.passed else "FAIL"
            print(
                f"[{verdict}] tp {row.tp:2d} ep {row.ep:2d}  {row.layer:32s} "
                f"{row.columns:5d} columns a rank, local group {row.local_group:3d}, "
                f"error {row.error:.1e}; SGLang's own method: {row.stock}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
