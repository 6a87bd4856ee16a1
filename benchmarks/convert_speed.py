"""How fast ``convert`` is, and how much memory it takes.

Two measurements:

* ``rounding``: one expert matrix of DeepSeek-R1 (2048 x 7168, FP8 128x128 or BF16) through a
  method, in memory, on one core or one GPU: the arithmetic alone.
* ``checkpoint``: a synthetic DeepSeek-like FP8 checkpoint of ``--gigabytes`` on disk, converted end
  to end (read, round, pack, hash, write, fsync), with the seconds of every stage, the speed of the
  disk alone, what the bound was, and the peak resident memory of every process. Experts are random,
  different in every shard; nothing is sparse. The page cache is dropped for the source files before
  the run (posix_fadvise), so reads come from the disk; ``--cached`` adds a run whose source lies in
  the page cache, which is what a faster disk would give.

    python benchmarks/convert_speed.py rounding --output benchmarks/results/NAME.json
    python benchmarks/convert_speed.py checkpoint --gigabytes 20 --workers 2 --directory /scratch
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import sglang_w4afp8
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.tools.rewrite import one_thread

ROWS, COLUMNS = 2048, 7168  # gate_proj of a DeepSeek-R1 expert
FP8 = torch.float8_e4m3fn


def environment(commit: str | None) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    if commit is None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sglang_w4afp8": sglang_w4afp8.__version__,
        "commit": commit or "unknown",
        # Where the files lie says nothing to a reader.
        "command": re.sub(
            r"(--directory|--output) \S+",
            r"\1 PLACE",
            " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        ),
    }


def _matrix(kind: str, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    if kind == "bf16":
        return weight.to(torch.bfloat16).to(device), None
    scale = torch.rand(ROWS // 128, COLUMNS // 128) * 1e-3 + 1e-4
    return (weight * 60).clamp(-448, 448).to(FP8).to(device), scale.to(device)


def rounding(device: str, repeats: int) -> list[dict[str, Any]]:
    """Time every method on one matrix, single-threaded on a CPU."""
    rows = []
    for kind in ("fp8", "bf16"):
        data, scale = _matrix(kind, device)
        for method, symmetric in (("rtn", True), ("mse", False), ("mse", True)):
            times, cpu_times = [], []
            for repeat in range(repeats + 1):
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                start, cpu_start = time.perf_counter(), time.thread_time()
                _, _, stats = quantize_weight(
                    data,
                    scale,
                    None if scale is None else (128, 128),
                    method=method,
                    symmetric=symmetric,
                )
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                if repeat:  # the first one warms up
                    times.append(time.perf_counter() - start)
                    cpu_times.append(time.thread_time() - cpu_start)
            size = data.numel() * data.element_size()
            rows.append(
                {
                    "source": kind,
                    "method": "mse --symmetric-range"
                    if (method, symmetric) == ("mse", True)
                    else method,
                    "device": device,
                    "mb_per_s_median": size / statistics.median(times) / 1e6,
                    "mb_per_s_best": size / min(times) / 1e6,
                    # On a shared machine the clock counts other people's work too.
                    "mb_per_core_s_median": size / statistics.median(cpu_times) / 1e6,
                    "snr_db": stats.snr_db,
                }
            )
    return rows


def _write_shard(file: Path, experts: range) -> int:
    """One source shard; returns its bytes."""
    generator = torch.Generator().manual_seed(1 + experts.start)
    tensors: dict[str, torch.Tensor] = {}
    for expert in experts:
        for name, shape in (
            ("gate_proj", (ROWS, COLUMNS)),
            ("up_proj", (ROWS, COLUMNS)),
            ("down_proj", (COLUMNS, ROWS)),
        ):
            raw = torch.randint(
                0, 256, (shape[0] * shape[1] // 8,), generator=generator, dtype=torch.uint8
            ).repeat(8)
            prefix = f"model.layers.3.mlp.experts.{expert}.{name}"
            # Two exponent bits are masked out, so that none is NaN.
            tensors[f"{prefix}.weight"] = (raw & 0xE7).view(FP8).view(shape)
            tensors[f"{prefix}.weight_scale_inv"] = torch.full(
                (shape[0] // 128, shape[1] // 128), 1e-3
            )
    save_file(tensors, file, metadata={"format": "pt"})
    return file.stat().st_size


def write_source(folder: Path, gigabytes: float, shard_bytes: int) -> int:
    """A DeepSeek-like FP8 checkpoint of about this size; returns its bytes."""
    per_expert = 3 * ROWS * COLUMNS
    experts = max(1, round(gigabytes * 1e9 / per_expert))
    per_shard = max(1, shard_bytes // per_expert)
    shards = -(-experts // per_shard)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        written = [
            pool.submit(
                _write_shard,
                folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors",
                range(shard * per_shard, min(experts, (shard + 1) * per_shard)),
            )
            for shard in range(shards)
        ]
        total = sum(future.result() for future in written)
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def drop_cache(folder: Path) -> None:
    """Make the next reads come from the disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_file(file: Path) -> int:
    buffer = bytearray(16 << 20)
    total = 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total += count
    return total


def read_speed(folder: Path, workers: int) -> float:
    """Bytes per second of reading the source alone, ``workers`` files at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        total = sum(pool.map(_read_file, sorted(folder.glob("*.safetensors"))))
    return total / (time.perf_counter() - start)


def write_speed(folder: Path, nbytes: int, workers: int) -> float:
    """Bytes per second of writing ``workers`` files and waiting until the disk has them."""
    block = os.urandom(16 << 20)

    def write(number: int) -> None:
        with (folder / f"probe-{number}").open("wb", buffering=0) as stream:
            for _ in range(nbytes // workers // len(block)):
                stream.write(block)
            os.fsync(stream.fileno())

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, range(workers)))
    seconds = time.perf_counter() - start
    for file in folder.glob("probe-*"):
        file.unlink()
    return nbytes // workers // len(block) * len(block) * workers / seconds


# Peak memory is the kernel's high-water mark (VmHWM) of each process; with workers, the largest
# worker's is sampled, since it is gone when the call returns.
_CONVERT = """
import json, os, resource, sys, threading, time
from sglang_w4afp8.tools.convert import convert_checkpoint

def mark(pid):
    try:
        lines = open(f"/proc/{pid}/status").read().splitlines()
        return max((int(l.split()[1]) / 1024 for l in lines if l.startswith("VmHWM")), default=0)
    except OSError:
        return 0

def workers():
    here = os.getpid()
    return open(f"/proc/{here}/task/{here}/children").read().split()

source, target, method, count, device = sys.argv[1:]
before, largest, running = mark("self"), 0, True

def watch():
    global largest
    while running:
        largest = max([largest, *(mark(pid) for pid in workers())])
        time.sleep(0.1)

thread = threading.Thread(target=watch)
thread.start()
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)

start, cpu_start = time.perf_counter(), cpu()
report = convert_checkpoint(source, target, method=method, workers=int(count), device=device)
seconds, cpu_seconds = time.perf_counter() - start, cpu() - cpu_start
running = False
thread.join()
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "shards": report.shards,
                  "stage_seconds": report.stage_seconds,
                  "rss_before_mb": before, "rss_peak_mb": mark("self"),
                  "rss_peak_worker_mb": largest}))
"""


def bound(run: dict[str, Any], size: int, written: int, disk: dict[str, float]) -> str:
    """What kept a run from being faster: the fullest of the disk and the job's own stages."""
    clock, workers = run["seconds"], run["workers"]
    used = {
        "disk read": 0.0 if run["cached"] else size / disk["read_mb_per_s"] / 1e6 / clock,
        "disk write": written / disk["write_mb_per_s"] / 1e6 / clock,
        "compute": run["stage_seconds"].get("compute", 0.0) / workers / clock,
        "hash and write": sum(run["stage_seconds"].get(key, 0.0) for key in ("hash", "write"))
        / workers
        / clock,
    }
    run["used"] = {key: round(value, 3) for key, value in used.items()}
    return max(used, key=lambda key: used[key])


def checkpoint(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Convert a synthetic checkpoint end to end, once for every method and state of the cache.

    Yields the result so far after every run.
    """
    shard_bytes = int(options.shard_gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        began = time.perf_counter()
        size = write_source(source, options.gigabytes, shard_bytes)
        result: dict[str, Any] = {
            "source_bytes": size,
            "shard_bytes": shard_bytes,
            "source_made_s": time.perf_counter() - began,
        }
        drop_cache(source)
        disk = {
            "read_mb_per_s": read_speed(source, options.workers) / 1e6,
            "write_mb_per_s": write_speed(source, min(size // 2, 4 << 30), options.workers) / 1e6,
        }
        result["disk"] = disk
        result["runs"] = []
        for cached in (False, True) if options.cached else (False,):
            for method in options.method:
                if cached:
                    read_speed(source, options.workers)
                else:
                    drop_cache(source)
                # In a process of its own: this one has held whole shards writing the source.
                call = [str(source), str(target), method, str(options.workers), options.device]
                done = subprocess.run(
                    [sys.executable, "-c", _CONVERT, *call], stdout=subprocess.PIPE, text=True
                )
                if done.returncode:
                    raise SystemExit(f"convert {method} ended with {done.returncode}")
                run = json.loads(done.stdout.splitlines()[-1])
                written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
                shutil.rmtree(target)
                run = {
                    "method": method,
                    "device": options.device,
                    "workers": options.workers,
                    "cached": cached,
                    "written_bytes": written,
                    "mb_per_s": size / run["seconds"] / 1e6,
                    "mb_per_core_s": size / run["cpu_seconds"] / 1e6,
                    **run,
                }
                run["bound"] = bound(run, size, written, disk)
                result["runs"].append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
                yield result


def write(result: dict[str, Any], output: Path | None) -> None:
    """Store the result if a file was asked for."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rounding", "checkpoint"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--directory", help="where the synthetic checkpoint goes")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--method", nargs="+", default=["mse"])
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--cached", action="store_true", help="once more with the source in the page cache"
    )
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(options.commit)}
    if options.what == "rounding":
        with one_thread():
            result["rounding"] = rounding(options.device, options.repeats)
    else:
        result["checkpoint"] = {}
        for so_far in checkpoint(options):
            result["checkpoint"] = so_far
            write(result, options.output)  # a run that is cut short leaves what it has
    write(result, options.output)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
