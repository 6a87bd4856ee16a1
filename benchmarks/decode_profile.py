"""The kernels of one decoder layer in a decode step of the real server, in the order they ran.

    python benchmarks/decode_profile.py --json decode-profile.json

Serves a Qwen3-MoE checkpoint of two layers, with the widths of Qwen3-30B-A3B and a quarter of its
experts, on the GPU with CUDA graphs, records a few decode steps with SGLang's own profiler, and
lists everything the GPU did from the end of one layer's experts to the
end of the next one's. The MoE part runs from the router's product to the last kernel of the
experts; a copy, a fill or an elementwise kernel in there would be a stray one. Exits with 1 if
something stands between the kernels of this package or is a copy or fill right before them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_w4afp8.testing import tiny
from sglang_w4afp8.testing.server import Server, launch
from sglang_w4afp8.tools.bench import environment
from sglang_w4afp8.tools.convert import convert_checkpoint

SHAPE = tiny.QwenShape(
    hidden_size=2048, moe_intermediate_size=768, num_experts=32, num_experts_per_tok=8
)
STEPS = 24
ROUTER = ("topk", "router", "gating")  # in the names of SGLang's kernels that choose experts
OURS = "w4a8_"


def main() -> int:
    """Record, list, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = tiny.write_qwen(folder / "source", SHAPE)
        convert_checkpoint(source, folder / "model", device="cuda")
        server_args = ["--quantization", "w4afp8", "--attention-backend", "triton"]
        server_args += ["--mem-fraction-static", "0.5", "--cuda-graph-max-bs-decode", "16"]
        strict = {"SGLANG_W4AFP8_STRICT": "1", "SGLANG_W4AFP8_MOE_BACKEND": "hopper"}
        with launch(
            folder / "model",
            log_dir=folder / "log",
            args=server_args,
            env=strict,
            platform=None,
            timeout_s=600,
        ) as server:
            cases = [record(server, batch, folder / f"trace-{batch}") for batch in args.batch]
    report = {**environment(args.commit), "model": asdict(SHAPE), "server_args": server_args}
    report["cases"] = cases
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    stray = [case["stray"] for case in cases]
    for case in cases:
        print(f"batch {case['batch']}: a layer's kernels")
        for kernel in case["layer"]:
            print(f"  {kernel['us']:7.1f} us  {kernel['name']}")
        print(f"  stray in the MoE part: {case['stray'] or 'none'}")
    return int(any(stray))


def record(server: Server, batch: int, folder: Path) -> dict[str, Any]:
    """Profile decode steps of ``batch`` sequences.

    Returns:
        batch; layer: name and microseconds of each kernel, copy or fill from the end of one
        layer's experts to the end of the next one's; stray: names that should not be there.
    """
    prompts = [[5 + i, 17, 99, 4, 211, 37] for i in range(batch)]
    server.generate(prompts, max_new_tokens=8)
    body = {"output_dir": str(folder), "activities": ["GPU"], "num_steps": STEPS}
    server.request("/start_profile", body)
    server.generate(prompts, max_new_tokens=3 * STEPS)
    deadline = time.monotonic() + 120
    while not (traces := list(folder.glob("*.trace.json.gz"))):
        if time.monotonic() > deadline:
            raise SystemExit(f"no trace appeared in two minutes; log:\n{server.log_text()[-2000:]}")
        time.sleep(0.5)
    time.sleep(2)  # it is written in one go, but not renamed into place
    with gzip.open(traces[0]) as file:
        events = json.load(file)["traceEvents"]
    layer = one_layer(events)
    return {"batch": batch, "layer": layer, "stray": strays(layer)}


def one_layer(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ran between the last expert kernels of two neighbouring layers of one decode step."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    ran = sorted((e for e in events if e.get("cat") in kinds), key=lambda event: event["ts"])
    ours = [i for i, event in enumerate(ran) if event["name"].startswith(OURS)]
    if not ours:
        raise SystemExit("the trace has none of this package's kernels")
    # A run of our kernels ends a layer; the shortest way from end to end is within one step, since
    # from the last layer to the next step there is also the head and the sampling.
    ends = [i for i, after in zip(ours, [*ours[1:], len(ran)], strict=True) if after != i + 1]
    pairs = list(zip(ends[len(ends) // 2 :], ends[len(ends) // 2 + 1 :], strict=False))
    start, end = min(pairs, key=lambda pair: pair[1] - pair[0])
    return [{"name": event["name"][:160], "us": event["dur"]} for event in ran[start + 1 : end + 1]]


def strays(layer: list[dict[str, Any]]) -> list[str]:
    """Copies and fills after the router's choice, and whatever stands between our kernels."""
    names = [kernel["name"] for kernel in layer]
    first = next(i for i, name in enumerate(names) if name.startswith(OURS))
    between = [name for name in names[first:] if not name.startswith(OURS)]
    routers = (i for i, n in enumerate(names[:first]) if any(word in n.lower() for word in ROUTER))
    chosen = max(routers, default=0)
    words = ("memcpy", "memset", "copy", "fill", "elementwise")
    before = [n for n in names[chosen + 1 : first] if any(word in n.lower() for word in words)]
    return between + before


if __name__ == "__main__":
    sys.exit(main())
