"""Loading copies slices, never whole tensors, and keeps at most one layer beside the result."""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("sglang")

from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = pytest.mark.sglang

PREFIX = cases.EXPERTS_PREFIX
EXPERTS, HIDDEN, INTERMEDIATE, TP = 2, 512, 2048, 32
SHAPE = cases.ExpertShape(EXPERTS, HIDDEN, INTERMEDIATE)


class Allocations(TorchDispatchMode):
    """Sizes of all storages that operations create, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in known:
                    self.sizes.append(storage.nbytes())
        return result


def expert_tensors() -> dict[str, torch.Tensor]:
    return cases.expert_tensors(SHAPE, PREFIX, input_scale=0.01)


def fp8_expert_tensors(shape: cases.ExpertShape) -> dict[str, torch.Tensor]:
    """One random FP8 matrix with 128x128 scales for each projection, shared by all experts."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, torch.Tensor] = {}
    sizes = (shape.intermediate, shape.hidden)
    for projection, (n, k) in {
        "gate_proj": sizes,
        "up_proj": sizes,
        "down_proj": sizes[::-1],
    }.items():
        weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.full((n // 128, k // 128), 1e-3)
        for expert in range(shape.experts):
            made[f"{PREFIX}.{expert}.{projection}.weight"] = weight
            made[f"{PREFIX}.{expert}.{projection}.weight_scale_inv"] = scale
    return made


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def build(
    tensors: dict[str, torch.Tensor],
    shape: cases.ExpertShape = SHAPE,
    quant: dict[str, Any] | None = None,
) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    return load_experts(
        ShardedW4AFp8Config.from_config(quant) if quant else ShardedW4AFp8Config(QuantSpec()),
        tensors,
        PREFIX,
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        top_k=1,
        dtype=torch.bfloat16,
    )


def test_nothing_larger_than_a_slice_is_copied() -> None:
    from sglang_w4afp8.srt.virtual_ranks import load_tensors, virtual_rank

    tensors = expert_tensors()
    matrices = {name: tensor for name, tensor in tensors.items() if "input_scale" not in name}
    with virtual_rank(3, TP):
        layer = build(tensors)  # parameters exist; now load the same tensors once more, watched
        slice_bytes = HIDDEN * INTERMEDIATE // TP // 2
        with Allocations() as seen:
            load_tensors(layer, matrices, PREFIX)
    # A scale column is gathered before it is written; codes are written straight from the file.
    assert max(seen.sizes, default=0) <= HIDDEN * 8 < slice_bytes


def test_rounding_while_loading_takes_a_part_of_one_projection() -> None:
    """FP8 in, INT4 out: nothing as large as a projection in float32 is ever made."""
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = fp8_expert_tensors(SHAPE)
    with virtual_rank(3, TP), Allocations() as seen:
        build(tensors, quant=FP8_CONFIG)
    # The rank's 64 rows lie in a block of 128; float32 groups and codes are as large as each other.
    window = 128 * HIDDEN * 4
    assert window <= max(seen.sizes) <= 2 * window < HIDDEN * INTERMEDIATE


def test_the_watch_would_see_a_whole_copy() -> None:
    tensors = expert_tensors()
    whole = tensors[f"{PREFIX}.0.down_proj.weight"]
    with Allocations() as seen:
        whole.clone()[:, :32].contiguous()
    assert max(seen.sizes) == whole.numel()


def _status_kib(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1])  # type: ignore[index]


def _build_layers(
    backend: str, shape: cases.ExpertShape, tp: int, quant: dict[str, Any] | None
) -> tuple[int, int, int, int]:
    """Build layers for a backend that fills up (cutlass) or reorders (hopper) after loading.

    Args:
        backend: its name.
        shape: of the whole layer.
        tp: rank 1 of so many, or the whole.
        quant: the checkpoint's ``quantization_config``, if it is to become W4AFP8 while loading.

    Returns:
        KiB: resident after the first layer, after all, the peak in between, and one layer's size.
    """
    from sglang_w4afp8.kernels.hopper.backend import HopperBackend
    from sglang_w4afp8.srt import moe
    from sglang_w4afp8.srt.cutlass import CutlassBackend
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    chosen = {"cutlass": CutlassBackend, "hopper": HopperBackend}[backend]
    moe.select = lambda problem: chosen()  # type: ignore[assignment]
    one = cases.expert_tensors(
        cases.ExpertShape(1, shape.hidden, shape.intermediate), PREFIX, input_scale=0.01
    )
    tensors = {
        name.replace(f"{PREFIX}.0.", f"{PREFIX}.{expert}."): tensor
        for expert in range(shape.experts)
        for name, tensor in one.items()
    }
    if quant:
        tensors = fp8_expert_tensors(shape)
        os.environ["SGLANG_W4AFP8_LOAD_METHOD"] = "rtn"
    with virtual_rank(min(1, tp - 1), tp):
        layers = [build(tensors, shape, quant)]
        start = _status_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        layers += [build(tensors, shape, quant) for _ in range(4)]
        end, peak = _status_kib("VmRSS"), _status_kib("VmHWM")
    held = sum(p.numel() * p.element_size() for p in layers[0].parameters()) // 1024
    return start, end, peak, held


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.parametrize(
    ("backend", "shape", "tp", "quant"),
    [
        ("cutlass", cases.ExpertShape(experts=64, hidden=2048, intermediate=1536), 8, None),
        ("cutlass", cases.ExpertShape(experts=64, hidden=2048, intermediate=1536), 8, FP8_CONFIG),
        # Few and large experts: whatever reordering one of them takes is a large part of a layer.
        ("hopper", cases.ExpertShape(experts=8, hidden=2048, intermediate=2048), 1, None),
    ],
    ids=["w4afp8", "fp8", "reordered"],
)
def test_resident_memory_peaks_one_layer_above_the_result(
    backend: str,
    shape: cases.ExpertShape,
    tp: int,
    quant: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Or glibc keeps what has been freed, more or less of it from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))
    # A process of its own: resident memory is the process's, and earlier tests leave some.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        start, end, peak, layer = pool.submit(_build_layers, backend, shape, tp, quant).result()
    result = start + 4 * layer
    assert end - start >= 3.5 * layer, "the layers are not resident, so nothing was measured"
    print(f"layer: {layer} KiB, peak: {peak - result} KiB above the result")
    # A tenth for the allocator, which may keep a freed layer's memory for the next.
    assert peak - result <= 1.1 * layer, f"{peak - result} KiB above the result; layer: {layer}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_is_one_layer_above_the_result() -> None:
    import gc

    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    shape = cases.ExpertShape(experts=8, hidden=2048, intermediate=2048)
    tensors = cases.expert_tensors(shape, PREFIX, input_scale=0.01)
    with virtual_rank(0, 1), torch.device("cuda"):
        build(tensors, shape)  # what a backend allocates once per process
        gc.collect()
        before = torch.cuda.memory_allocated()
        layers = [build(tensors, shape)]
        one_layer = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        layers += [build(tensors, shape) for _ in range(4)]
        gc.collect()
    result = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert result >= len(layers) * one_layer
    assert peak - result <= one_layer
