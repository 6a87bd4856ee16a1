"""What ``plan`` foretells of a server's memory, and what the server says: one GPU, dummy weights.

    python benchmarks/plan_vs_server.py --gpu h100 --json OUT.json

Writes the config.json of a DeepSeek-R1 with all widths and experts but few layers, plans it, serves
it with ``--load-format dummy`` and compares weights and KV-cache tokens with the server's log.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_w4afp8.testing import tiny
from sglang_w4afp8.testing.server import launch
from sglang_w4afp8.testing.tiny_tokenizer import write_tokenizer
from sglang_w4afp8.tools.plan import Layout, make_plan
from sglang_w4afp8.tools.plan_gpus import find_gpu
from sglang_w4afp8.tools.plan_source import find_model

WEIGHTS = re.compile(r"Load weight end.*?mem usage=([\d.]+) GB")
TOKENS = re.compile(r"max_total_num_tokens=(\d+)")
FREE = re.compile(r"Load weight begin.*?avail mem=([\d.]+) GB")


def write_config(folder: Path, layers: int, experts: int, small: bool) -> None:
    """A W4AFP8 config.json with DeepSeek-R1's widths, or with those of ``testing.tiny``."""
    shape = tiny.DeepseekShape() if small else tiny.DeepseekShape(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=layers, num_attention_heads=128,
        q_lora_rank=1536, kv_lora_rank=512, intermediate_size=18432, moe_intermediate_size=2048,
        n_routed_experts=experts, num_experts_per_tok=8, n_group=8, topk_group=4,
        first_k_dense_replace=1, max_position_embeddings=8192,
    )  # fmt: skip
    config = tiny._deepseek_config(shape, True)
    section = {"quant_method": "w4afp8", "group_size": 128, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    write_tokenizer(folder, vocab_size=512, max_length=shape.max_position_embeddings)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Serve the folder and read the log."""
    command = ["--quantization", "w4afp8", "--load-format", "dummy", "--skip-server-warmup"]
    env = {"SGLANG_W4AFP8_STRICT": "1"}
    with launch(
        folder, log_dir=folder / "log", args=[*command, *args.server], env=env,
        platform=args.platform, timeout_s=args.timeout,
    ) as server:  # fmt: skip
        log = server.log_text()
    found = {"weights_gib": WEIGHTS, "tokens": TOKENS, "free_before_gib": FREE}
    numbers = {name: pattern.search(log) for name, pattern in found.items()}
    return {name: float(match[1]) if match else None for name, match in numbers.items()}


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 when the server's log lacks a number."""
    parser = argparse.ArgumentParser(prog="benchmarks/plan_vs_server.py")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--platform", help="SGLANG_PLATFORM, w4afp8_cpu to try the script")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="server arguments")
    parser.add_argument("--json", type=Path, help="write the comparison here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="w4afp8-plan-") as scratch:
        folder = Path(scratch)
        write_config(folder, args.layers, args.experts, args.small)
        plan = make_plan(find_model(scratch), Layout(1, 1, 1, find_gpu(args.gpu)))
        told = {
            "weights_gib": plan.rank.nbytes / 2**30,
            "tokens": plan.kv.tokens,
            "mem_fraction": plan.kv.mem_fraction,
            "backend": plan.rank.backend,
        }
        print("plan:  ", json.dumps(told), flush=True)
        seen = measure(folder, args)
    print("server:", json.dumps(seen), flush=True)
    if None in (seen["weights_gib"], seen["tokens"]):
        return 1
    ratios = {key: round(seen[key] / told[key], 4) for key in ("weights_gib", "tokens")}
    print("server / plan:", json.dumps(ratios))
    if args.json:
        document = {"gpu": args.gpu, "layers": args.layers, "experts": args.experts}
        document |= {"plan": told, "server": seen, "server_over_plan": ratios}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
