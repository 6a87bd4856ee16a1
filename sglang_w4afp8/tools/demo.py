"""``sglang-w4afp8 demo``: the main job end to end on whatever machine this is.

Writes two small real checkpoints (DeepSeek-V3 and Qwen3-MoE architecture), converts them to W4AFP8,
serves them with the real ``sglang.launch_server`` at several tensor-parallel degrees, compares the
answers with each other and with transformers on the dequantised weights, and loads the layers as 8,
16 and 32 ranks. Without a GPU everything runs on the CPU platform in float32; with one, the servers
run on it as usual. Owns the story and its printing; the work is done by the modules it calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path

from sglang_w4afp8.errors import HostError, W4AFp8Error
from sglang_w4afp8.tools.demo_answers import (
    NEW_TOKENS,
    PROMPTS,
    Judge,
    Served,
    Story,
    compare,
    say,
)
from sglang_w4afp8.tools.versions import version_of

TEXT = "Sharding is exact when"
REPORTED = ("sglang-w4afp8", "sglang", "sglang-kernel", "torch", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``demo``."""
    parser.add_argument("--dir", type=Path, help="keep checkpoints and logs here (default: a temp)")
    parser.add_argument("--tp", type=int, nargs="+", help="degrees to serve at (default: 1 2 4)")
    parser.add_argument("--shards", type=int, nargs="*", default=[8, 16, 32], metavar="TP")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON at the end")
    parser.add_argument("--out", type=Path, help="write the findings as JSON to this file")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything agreed, 1 otherwise."""
    gpus = 0 if args.cpu else _gpu_count()
    device = f"{gpus} × {_gpu_name()}" if gpus else f"CPU, {os.cpu_count()} cores"
    degrees = args.tp or ([d for d in (1, 2, 4) if d <= gpus] if gpus else [1, 2, 4])
    with tempfile.TemporaryDirectory(prefix="w4afp8-demo-") as scratch:
        folder = args.dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        story = tell(folder, degrees, args.shards, device, on_gpu=bool(gpus))
    findings = json.dumps(asdict(story), indent=1)
    if args.json:
        print(findings)
    if args.out:
        args.out.write_text(findings + "\n")
    for problem in story.problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    if not story.problems:
        say("everything agrees")
    return int(bool(story.problems))


def tell(
    folder: Path, degrees: list[int], shard_degrees: list[int], device: str, *, on_gpu: bool
) -> Story:
    """The four steps.

    Args:
        folder: where checkpoints and logs go.
        degrees: tensor-parallel degrees to serve at.
        shard_degrees: degrees to load layers at, in one process.
        device: for the report.
        on_gpu: serve on GPUs in BF16 with FP8 activations instead of on the CPU in float32.
    """
    # Paths of the machine have no place in a report.
    words = [word for word in sys.argv[1:] if "/" not in word and word not in ("--out", "--dir")]
    command = " ".join(["sglang-w4afp8", "demo", *[w for w in words if w != "demo"]])
    story = Story(device, {name: version_of(name) for name in REPORTED}, command)
    checkpoints = {}
    say(f"device: {device}")
    for name, source in write_checkpoints(folder).items():
        checkpoints[name] = convert(name, source)
    for name, checkpoint in checkpoints.items():
        judge = Judge(checkpoint, coarse=on_gpu)
        say(f"      {name}: transformers on the dequantised weights: {judge.seconds:.0f} s")
        results = []
        for tp, backend in product(degrees, ("auto", "torch") if on_gpu else ("auto",)):
            say(
                f"[3/4] {name}: starting sglang.launch_server --tp {tp} --quantization w4afp8 "
                f"({backend} backend) …"
            )
            logs = folder / "logs" / f"{name}-tp{tp}-{backend}"
            results.append(serve(checkpoint, tp, backend, logs, on_gpu, judge.texts))
            show(results[-1])
        story.served[name] = [asdict(result) for result in results]
        compare(name, judge, results, story, on_gpu=on_gpu)
    if shard_degrees:
        for name, checkpoint in checkpoints.items():
            check_shards(name, checkpoint, shard_degrees, story)
        for name, checkpoint in widths(folder).items():
            check_shards(name, checkpoint, [8], story)
    return story


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Step 1: two real Hugging Face checkpoints."""
    from sglang_w4afp8.testing.tiny import DeepseekShape, write_deepseek, write_qwen

    written = {
        # The published latent width: SGLang's GPU attention kernels are built for it.
        "deepseek-v3": write_deepseek(folder / "deepseek-v3", DeepseekShape(kv_lora_rank=512)),
        "qwen3-moe": write_qwen(folder / "qwen3-moe"),
    }
    for name, path in written.items():
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2**20
        say(f"[1/4] {name}: wrote {size:.0f} MiB of safetensors, config and tokenizer")
    return written


def widths(folder: Path) -> dict[str, Path]:
    """Experts of the widths that published models have on a rank at tp 8: 192, 320, 176 columns."""
    from sglang_w4afp8.testing.tiny import QwenShape, write_qwen
    from sglang_w4afp8.tools.convert import convert_checkpoint

    made = {}
    for columns, model in ((192, "qwen3-235b"), (320, "qwen3-480b"), (176, "glm-4.5-air")):
        name = f"width-of-{model}"
        shape = QwenShape(num_hidden_layers=1, num_experts=4, moe_intermediate_size=8 * columns)
        source = write_qwen(folder / name, shape)
        convert_checkpoint(source, folder / f"{name}-w4afp8")
        made[name] = folder / f"{name}-w4afp8"
    return made


def convert(name: str, source: Path) -> Path:
    """Step 2: experts to INT4, everything else as it is."""
    from sglang_w4afp8.tools.convert import convert_checkpoint

    target = source.with_name(f"{source.name}-w4afp8")
    report = convert_checkpoint(source, target)
    say(
        f"[2/4] {name}: {report.tensors_converted} expert tensors → INT4 group "
        f"{report.group_size} ({report.method}, {report.quality['overall']['snr_db']:.1f} dB SNR), "
        f"{report.tensors_copied} tensors copied, "
        f"{report.source_bytes / 2**20:.0f} → {report.output_bytes / 2**20:.0f} MiB"
    )
    return target


def serve(
    checkpoint: Path, tp: int, backend: str, log_dir: Path, on_gpu: bool, texts: list[list[int]]
) -> Served:
    """Step 3: a real server, native and OpenAI-style requests, plain and streaming.

    Args:
        checkpoint: what to serve.
        tp: tensor-parallel degree.
        backend: the expert kernel.
        log_dir: for the server's log.
        on_gpu: see :func:`tell`.
        texts: token ids whose logprobs the server is asked for.
    """
    from sglang_w4afp8.testing.cpu_platform import NAME as CPU_PLATFORM
    from sglang_w4afp8.testing.server import launch

    args = ["--quantization", "w4afp8"]
    env = {"SGLANG_W4AFP8_STRICT": "1", "SGLANG_W4AFP8_MOE_BACKEND": backend}
    if on_gpu:
        args += ["--attention-backend", "triton", "--mem-fraction-static", "0.5"]
        args += ["--cuda-graph-max-bs-decode", "8"]
    else:
        # float32 and unrounded activations: the judge then has to agree to rounding.
        args += ["--dtype", "float32"]
        env["SGLANG_W4AFP8_ACTIVATION"] = "none"
    platform = None if on_gpu else CPU_PLATFORM
    with launch(
        checkpoint, log_dir=log_dir, tp=tp, args=args, env=env, platform=platform, timeout_s=900
    ) as server:
        replies = server.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        forced = server.generate(texts, max_new_tokens=1, prompt_logprobs=True)
        text = server.complete(TEXT, max_tokens=NEW_TOKENS)["choices"][0]["text"]
        # With a cached prefix a GPU takes other kernels, whose BF16 sums differ in the last bit.
        server.flush_cache()
        chunks = server.stream(TEXT, max_tokens=NEW_TOKENS)
        streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        log = server.log_text()
        if "registered quantization 'w4afp8'" not in log or "MoE layers, tp=" not in log:
            raise HostError(
                f"the server's log ({server.logs[0]}) has no line of this plugin",
                "SGLang answered with its own method",
                ["sglang-w4afp8 doctor"],
            )
        return Served(
            tp,
            backend,
            server.ready_s,
            [reply.token_ids for reply in replies],
            [reply.logprobs for reply in replies],
            [reply.prompt_logprobs for reply in forced],
            text,
            streamed,
        )


def show(served: Served) -> None:
    """Print one server's answers."""
    say(
        f"      ready after {served.ready_s:.0f} s; POST /v1/completions {TEXT!r} → {served.text!r}"
    )
    if served.streamed != served.text:
        say(f"      streamed differently: {served.streamed!r}")
    say(f"      greedy tokens of prompt 1: {served.token_ids[0]}")


def check_shards(name: str, checkpoint: Path, degrees: list[int], story: Story) -> None:
    """Step 4: the layers as every rank, in a process of its own."""
    say(f"[4/4] {name}: loading its layers as {', '.join(map(str, degrees))} ranks …")
    command = [sys.executable, "-W", "ignore", "-m", "sglang_w4afp8.srt.shard_check"]
    command += [str(checkpoint), "--json", "--tp", *map(str, degrees)]
    done = subprocess.run(command, capture_output=True, text=True, env=_cpu_environment())
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        mark = "ok  " if row["passed"] else "FAIL"
        say(
            f"      [{mark}] tp {row['tp']:2d} {row['layer']}: {row['columns']} columns a rank, "
            f"sum of ranks − whole {row['error']:.1e}; SGLang alone: {row['stock']}"
        )
        if not row["passed"]:
            story.problems.append(f"{name}: {row['layer']} at tp {row['tp']}: {row['error']:.1e}")
    story.shards += rows
    if done.returncode and not story.problems:
        story.problems.append(f"{name}: {done.stderr.strip()[-2000:]}")


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0)


def _cpu_environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> int:
    """``python -m sglang_w4afp8.tools.demo``."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except W4AFp8Error as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
