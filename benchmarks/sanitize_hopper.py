"""compute-sanitizer over every path of the Hopper kernels, on small shapes.

    python benchmarks/sanitize_hopper.py --json benchmarks/results/sanitize-hopper-h100.json

Runs the tests that give w2 back bit for bit (all four paths, calls of 8 or 64 tokens), and those
whose CTAs have a few items each and add several experts up (the prefill path), under racecheck and
memcheck, limited to kernels with ``w4a8`` in their names, as torch's are not ours to judge.
Racecheck is given kernels in which every lane of a warp arrives at a barrier (``W4_EVERY_LANE`` in
``csrc/primitives.cuh``), memcheck those that are served. A kernel with a name like theirs and a
race on purpose goes first, so that a filter that matches nothing cannot look clean. Needs a Hopper
card and the CUDA toolkit. Exits with 1 unless the control is caught and everything else is clean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_w4afp8 import env
from sglang_w4afp8.tools.bench_environment import environment

ROOT = Path(__file__).resolve().parents[1]
FILTER = ["--kernel-name", "kns=w4a8"]
FILES = [f"tests/gpu/test_{name}.py" for name in ("hopper_moe", "hopper_prefill", "deepep_prefill")]
TESTS = [*FILES, "-k", "w2_bit_for_bit or few_items"]
TOOLS = {"racecheck": ["--racecheck-report", "all"], "memcheck": []}
EVERY_LANE = ("racecheck",)  # tools for which every lane of a warp arrives
RACY = """
__global__ void w4a8_racy(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}
int main() {
  int* out;
  if (cudaMalloc(&out, 64 * sizeof(int))) return 2;
  w4a8_racy<<<1, 64>>>(out);
  return cudaDeviceSynchronize();
}
"""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", help="of this package; asked from git by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each tool")
    options = parser.parse_args()
    for program in ("compute-sanitizer", "nvcc"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not on PATH: add the bin folder of a CUDA toolkit")
    # Kernels are compiled and cached first: the sanitizer follows children and slows them down.
    for every_lane in (True, False):
        _tests([], 600, every_lane)
    control = _control()
    print(f"control: racecheck finds {control} hazards in a racy kernel", flush=True)
    runs = []
    for tool, extra in TOOLS.items():
        command = ["compute-sanitizer", "--tool", tool, *FILTER, *extra]
        runs.append(_judge(tool, command, options.limit))
        print(runs[-1]["tool"], runs[-1]["summary"], runs[-1]["tests"], flush=True)
    clean = control > 0 and all(run["clean"] for run in runs)
    text = {
        **environment(options.commit),
        "sanitizer": _version(),
        "command": f"python benchmarks/sanitize_hopper.py --limit {options.limit:.0f} --json FILE",
        "control_hazards": control,
        "runs": runs,
        "clean": clean,
    }
    options.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0 if clean else 1


def _version() -> str:
    done = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True)
    found = re.search(r"Version \S+", done.stdout)
    return found[0] if found else "unknown"


def _control() -> int:
    """Hazards that racecheck sees in a kernel that has one and a name that passes the filter."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "racy.cu", Path(folder) / "racy"
        source.write_text(RACY)
        subprocess.run(["nvcc", "-arch=sm_90", "-o", program, source], check=True)
        command = ["compute-sanitizer", "--tool", "racecheck", *FILTER, str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazard", done.stdout)
    return int(found[1]) if found else 0


def _tests(wrapper: list[str], limit: float, every_lane: bool) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, env.EVERY_LANE.name: f"{every_lane:d}"}
    command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{' '.join(command)}: not done in {limit:.0f} s; raise --limit") from None
    if not wrapper and done.returncode:
        raise SystemExit(f"the tests fail without a sanitizer:\n{done.stdout[-2000:]}")
    return done


def _judge(tool: str, command: list[str], limit: float) -> dict[str, Any]:
    """One tool over all tests: clean if it says so and every test passed under it."""
    begin = time.monotonic()
    every_lane = tool in EVERY_LANE
    done = _tests(command, limit, every_lane)
    summary = re.search(
        rf"{'RACECHECK' if tool == 'racecheck' else 'ERROR'} SUMMARY: .*", done.stdout
    )
    tests = re.search(r"\d+ passed.* in ", done.stdout)
    numbers = [int(n) for n in re.findall(r"\d+", summary[0])] if summary else [-1]
    return {
        "tool": tool,
        "every_lane": every_lane,
        "command": " ".join(
            [
                f"{env.EVERY_LANE.name}={every_lane:d}",
                *command,
                "python -m pytest",
                shlex.join(TESTS),
            ]
        ),
        "summary": summary[0] if summary else done.stdout[-1000:],
        "tests": tests[0].removesuffix(" in ") if tests else done.stdout[-1000:],
        "seconds": round(time.monotonic() - begin, 1),
        "clean": done.returncode == 0 and tests is not None and not any(numbers),
    }


if __name__ == "__main__":
    sys.exit(main())
