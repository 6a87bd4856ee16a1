"""Writes ``results/scaling-on-paper.json``: what ``plan --scaling`` estimates for DeepSeek-R1.

    python benchmarks/scaling_on_paper.py

Nothing is measured. The formulas and their sources are in ``sglang_w4afp8/tools/plan_scaling.py``;
the only measured numbers in the file are the published ones it repeats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sglang_w4afp8.tools.plan_gpus import GPUS
from sglang_w4afp8.tools.plan_scaling import (
    CONTEXT,
    FABRICS,
    LINK_SHARE,
    MATH_SHARE,
    PUBLISHED,
    READ_SHARE,
    estimate,
    table,
)
from sglang_w4afp8.tools.plan_source import find_model

OUT = Path(__file__).parent / "results" / "scaling-on-paper.json"
# Fabrics that are sold with the card.
PAIRS = {"l40s": ("pcie",), "h20": ("nvlink", "rdma"), "h100": ("nvlink", "rdma")}


def document() -> dict[str, Any]:
    """What the file holds."""
    model = find_model("DeepSeek-R1")
    rows = [
        row for gpu, names in PAIRS.items() for row in table(model, GPUS[gpu])
        if row["fabric"] in names
    ]  # fmt: skip
    like_published = estimate(
        model, 32, 128, GPUS["l40s"], FABRICS["pcie"], fp8_experts=True
    ).as_row()
    return {
        "what": "ESTIMATE from data sheets and NCCL's cost model, not a measurement",
        "command": "python benchmarks/scaling_on_paper.py",
        "model": model.name,
        "assumptions": {
            "context_tokens": CONTEXT,
            "share_of_memory_bandwidth": READ_SHARE,
            "share_of_fp8_rate": MATH_SHARE,
            "share_of_link_rate": LINK_SHARE,
            "fabrics": {fabric.name: fabric.title for fabric in FABRICS.values()},
        },
        "published": PUBLISHED,
        "same_layout_with_fp8_experts": like_published,
        "published_itl_over_estimate": round(PUBLISHED["itl_ms"] / like_published["itl_ms"], 2),
        "rows": rows,
    }


def main() -> int:
    """Write the file."""
    OUT.write_text(json.dumps(document(), indent=1) + "\n")
    print(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
