"""The support table of the README, made by asking every backend about every kind of card.

``python -m sglang_w4afp8.kernels.support`` prints it; a test compares the README with it.
"""

from __future__ import annotations

from itertools import product

import torch

from sglang_w4afp8.kernels.registry import BACKENDS, get_backend
from sglang_w4afp8.layer import Device, MoEProblem
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import GROUP_SIZES, ActivationScheme

DEVICES = {
    "CPU": Device("cpu"),
    "Ampere (A100) 8.0": Device("cuda", (8, 0), "A100"),
    "Ada (L40S, L20) 8.9": Device("cuda", (8, 9), "L40S"),
    "Hopper (H100, H200, H20) 9.0": Device("cuda", (9, 0), "H100"),
    "Blackwell (B200) 10.0": Device("cuda", (10, 0), "B200"),
    "Blackwell (RTX) 12.0": Device("cuda", (12, 0), "RTX PRO 6000"),
}
_SCHEMES = {
    ActivationScheme.STATIC: "static",
    ActivationScheme.DYNAMIC_PER_TENSOR: "per tensor",
    ActivationScheme.DYNAMIC_PER_TOKEN: "per token",
}
# DeepSeek-R1 at tp 32, whose shard is half a group, and at tp 8, whose shard is two.
_COLUMNS = {"any shard": (1, 32), "whole groups": (0, 8)}


def support_table() -> str:
    """Markdown: one row a backend, one column a device, the cells what it takes there."""
    lines = ["| backend | " + " | ".join(DEVICES) + " |", "|---" * (len(DEVICES) + 1) + "|"]
    for name in BACKENDS:
        cells = [_cell(name, device) for device in DEVICES.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(backend: str, device: Device) -> str:
    taken = {
        (group, scheme, shard)
        for group, scheme, shard in product(GROUP_SIZES, _SCHEMES, _COLUMNS)
        if get_backend(backend).supports(_problem(device, group, scheme, shard)) is None
    }
    if not taken:
        return "—"
    groups = "/".join(str(g) for g in GROUP_SIZES if any(t[0] == g for t in taken))
    schemes = [label for s, label in _SCHEMES.items() if any(t[1] is s for t in taken)]
    activations = "any" if len(schemes) == len(_SCHEMES) else ", ".join(schemes)
    shards = next(shard for shard in _COLUMNS if any(t[2] == shard for t in taken))
    return f"group {groups}; {activations} activations; {shards}"


def _problem(device: Device, group: int, scheme: ActivationScheme, shard: str) -> MoEProblem:
    rank, tp_size = _COLUMNS[shard]
    return MoEProblem(
        num_experts=256,
        hidden_size=7168,
        columns=AxisShard.even(2048, group, rank, tp_size),
        group_size=group,
        top_k=8,
        scheme=scheme,
        device=device,
        dtype=torch.bfloat16,
    )


if __name__ == "__main__":
    print(support_table())
