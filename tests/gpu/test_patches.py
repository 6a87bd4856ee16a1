"""The patch series on a GPU: SGLang's own method, patched, on a copy of the installed package.

As far as the series fits the installed release: all of it on 0.5.23, patches 0 to 3 on 0.5.16.
The layers run in a process of their own, this file as a script, with the patched copy first on its
path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sglang,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ROOT = Path(__file__).resolve().parents[2]
UPTO = {"0.5.16": 3, "0.5.23": 7}
WIDTHS = [(2048, 32), (1536, 8), (2560, 8), (1408, 2), (2048, 8)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Relative error of every case, as the patched process found it."""
    spec = find_spec("sglang")
    if spec is None or version("sglang") not in UPTO:
        pytest.skip(f"needs SGLang {' or '.join(UPTO)}")
    tree = tmp_path_factory.mktemp("patched")
    installed = Path(next(iter(spec.submodule_search_locations or ())))
    ignore = shutil.ignore_patterns("__pycache__", "multimodal_gen")
    shutil.copytree(installed, tree / "sglang", ignore=ignore)
    number = str(UPTO[version("sglang")])
    apply = [sys.executable, str(ROOT / "patches/apply.py"), "apply", str(tree)]
    subprocess.run([*apply, "--series", "sglang-0.5.23", "--upto", number], check=True)
    path = os.pathsep.join([str(tree), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tree)],
        env=os.environ | {"PYTHONPATH": path, "SGLANG_PLUGINS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("intermediate", "tp"), WIDTHS)
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_experts_of_all_ranks_add_up(
    measured: dict[str, float], intermediate: int, tp: int, scheme: str
) -> None:
    if scheme == "dynamic" and UPTO[version("sglang")] < 6:
        pytest.skip("patch 6 is not applied to this release")
    # The tolerance of the same kernel in test_sglang_layers.py, where its reason is.
    assert measured[f"experts {intermediate} tp{tp} {scheme}"] < 2.5e-2


def test_a_linear_of_64_blocks_is_the_one_of_128_blocks(measured: dict[str, float]) -> None:
    """Patch 4's kernel call: blocks of 64 that repeat the scales. Rounding of inputs dominates."""
    for size in (576, 64):
        assert measured[f"rows {size}"] < 4e-2
        assert measured[f"columns {size}"] < 4e-2


def run_experts_case(intermediate: int, tp: int, scheme: str) -> float:
    """Sum of all ranks' outputs against the oracle, in the patched process."""
    import test_sglang_layers as layers
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    from sglang_w4afp8.spec import ActivationScheme
    from sglang_w4afp8.srt.virtual_ranks import load_experts, run_experts, virtual_rank

    tensors = layers.expert_tensors(intermediate)
    inputs = layers.routing(64)
    total = torch.zeros(64, layers.HIDDEN, dtype=torch.float64, device="cuda")
    for rank in range(tp):
        with virtual_rank(rank, tp), torch.device("cuda"):
            layer = load_experts(
                W4AFp8Config(moe_activation_scheme=scheme),
                tensors,
                layers.PREFIX,
                num_experts=layers.EXPERTS,
                hidden_size=layers.HIDDEN,
                intermediate_size=intermediate,
                top_k=layers.TOP_K,
                dtype=torch.bfloat16,
            )
            assert type(layer.quant_method).__name__ == "W4AFp8MoEMethod"
            total += run_experts(layer, *inputs).double()
    judge = ActivationScheme(scheme if scheme == "static" else "dynamic_per_tensor")
    expected = layers.oracle(tensors, judge, inputs, intermediate, tp)
    return float((total - expected).norm() / expected.norm())


def run_linear_case(rows: int, columns: int) -> float:
    """The Triton block kernel at 64 × 64 blocks against the dequantised weight of 128 × 128."""
    from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn).cuda()
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator).cuda() + 0.5
    fine = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)[: rows // 64, : columns // 64]
    x = torch.randn(33, columns, generator=generator).bfloat16().cuda()
    actual = triton_w8a8_block_fp8_linear(x, weight, [64, 64], fine.contiguous()).double()
    dense = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    expected = x.double() @ (weight.double() * dense.double()).T
    return float((actual - expected).norm() / expected.norm())


if __name__ == "__main__":
    import sglang

    assert Path(sglang.__file__).is_relative_to(sys.argv[1]), sglang.__file__
    found = {f"rows {size}": run_linear_case(size, 1024) for size in (576, 64)}
    found |= {f"columns {size}": run_linear_case(1024, size) for size in (576, 64)}
    schemes = ("static", "dynamic") if UPTO[version("sglang")] >= 6 else ("static",)
    for scheme in schemes:
        for intermediate, tp in WIDTHS:
            name = f"experts {intermediate} tp{tp} {scheme}"
            found[name] = run_experts_case(intermediate, tp, scheme)
    print(json.dumps(found))
