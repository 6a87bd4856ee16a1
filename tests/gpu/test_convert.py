"""Conversion on a GPU gives what a CPU gives, up to the last bit of a scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_w4afp8.packing import unpack_int4
from sglang_w4afp8.quantize.mse import search_scales
from sglang_w4afp8.quantize.rtn import round_scale
from sglang_w4afp8.testing.checkpoints import MoeShape, write_fp8
from sglang_w4afp8.tools.convert import convert_checkpoint

pytestmark = pytest.mark.gpu


def heavy(*shape: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_finds_the_scales_of_the_loop(group: int, symmetric: bool) -> None:
    groups = heavy(500, 7, group)
    groups[3, 2] = 0.0
    expected = round_scale(search_scales(groups, symmetric=symmetric))
    found = round_scale(search_scales(groups.cuda(), symmetric=symmetric)).cpu()
    # Two candidates of almost equal error may change places, hence not all.
    assert (found == expected).double().mean() > 0.995
    assert torch.allclose(found, expected, rtol=0.2)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_checkpoint_converted_on_the_gpu(tmp_path: Path, method: str) -> None:
    source = write_fp8(tmp_path / "src", MoeShape(hidden=512, inner=384, experts=6), shards=5)
    reports = {
        device: convert_checkpoint(
            source, tmp_path / device, method=method, device=device, workers=3
        )
        for device in ("cpu", "cuda")
    }
    quality = [report.quality["overall"]["snr_db"] for report in reports.values()]
    assert abs(quality[0] - quality[1]) < 2e-3
    assert reports["cuda"].stage_seconds["compute"] > 0.0
    checked = 0
    for file in sorted((tmp_path / "cpu").glob("*.safetensors")):
        on_cpu, on_gpu = load_file(file), load_file(tmp_path / "cuda" / file.name)
        assert on_cpu.keys() == on_gpu.keys()
        for name, tensor in on_cpu.items():
            if tensor.dtype != torch.int8:
                continue
            same = unpack_int4(tensor) == unpack_int4(on_gpu[name])
            assert same.double().mean() > 0.995, name
            checked += 1
    assert checked == 2 * 6 * 3  # the MTP layer too
