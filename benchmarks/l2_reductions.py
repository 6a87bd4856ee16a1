"""How fast the L2 of a Hopper card adds rows up, beside plain stores of the same shapes.

    python benchmarks/l2_reductions.py --json benchmarks/results/l2-reductions-h100.json

What a down projection that combines its experts in memory can hope for: bulk reductions from shared
memory and ``red`` from registers, of every type that may serve, to random rows of regions that fit
L2 and of one that does not. Needs nvcc. About 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_w4afp8.tools.bench_environment import environment


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="of this package; asked from git by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "l2_reductions"
        source = Path(__file__).with_suffix(".cu")
        architecture = "-gencode=arch=compute_90a,code=sm_90a"
        command = ["nvcc", "-O3", "-std=c++17", architecture, "-o", str(program), str(source)]
        subprocess.run(command, check=True)
        done = subprocess.run([program], check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    if options.json:
        command = ["python", "benchmarks/l2_reductions.py", *sys.argv[1:]]
        text = {**environment(options.commit), "command": " ".join(command), "rows": rows}
        options.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
