"""Random tensors and the sharded safetensors writer behind ``testing.tiny``.

Every tensor is drawn from its own generator, seeded by (seed, name): a tensor does not change when
another one is added, and files can be written one at a time. Values are deliberately uneven, with a
gain per 32 rows and per 32 columns, so that neighbouring scale groups differ by tens of percent:
code that pairs a weight with the scale next to the right one is then far off, not nearly right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FP8_MAX = 448.0  # largest finite float8_e4m3fn
BLOCK = 128  # rows and columns per FP8 scale
_PATCH = 32  # rows or columns that share a gain; divides every supported group size


@dataclass(frozen=True)
class TensorSpec:
    """One checkpoint tensor.

    Attributes:
        name: full name, e.g. ``model.layers.0.mlp.down_proj.weight``.
        shape: as stored.
        std: standard deviation of the values (about their mean).
        mean: mean of the values (1 for norm weights).
        dtype: stored dtype; float8_e4m3fn adds ``<name>_scale_inv``, float32, one per 128x128.
        quiet_rows: this many first rows are a quarter as large, and no gains are applied. For
            lm_head: keeps special tokens and stray bytes out of the generated text.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    quiet_rows: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, scales included."""
        count = 1
        for size in self.shape:
            count *= size
        scales = 0
        if self.dtype == torch.float8_e4m3fn:
            scales = 4 * -(-self.shape[0] // BLOCK) * -(-self.shape[1] // BLOCK)
        return count * self.dtype.itemsize + scales


def draw(spec: TensorSpec, seed: int) -> torch.Tensor:
    """The tensor's values as float32, before they are rounded to the stored dtype."""
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values = torch.randn(spec.shape, generator=generator)
    if spec.quiet_rows:
        values[: spec.quiet_rows] *= 0.25
    elif len(spec.shape) == 2:
        for dim, size in enumerate(spec.shape):
            log_gain = 0.35 * torch.randn(-(-size // _PATCH), generator=generator)
            gain = torch.exp(log_gain).repeat_interleave(_PATCH)[:size]
            values = values * (gain[:, None] if dim == 0 else gain[None, :])
        values = values / values.square().mean().sqrt()
    return values * spec.std + spec.mean


def quantize_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to DeepSeek's block-FP8.

    Args:
        weight: (N, K) float32.

    Returns:
        float8_e4m3fn (N, K), and float32 (ceil(N/128), ceil(K/128)) scales, value = fp8 * scale.
        The last block of a row or column may be partial.
    """
    rows, cols = weight.shape
    grid_rows, grid_cols = -(-rows // BLOCK), -(-cols // BLOCK)
    padded = torch.zeros(grid_rows * BLOCK, grid_cols * BLOCK)
    padded[:rows, :cols] = weight
    blocks = padded.view(grid_rows, BLOCK, grid_cols, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / FP8_MAX
    codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :cols].contiguous(), scale


def store(spec: TensorSpec, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a spec as they go into the file: one, or weight and scales for FP8."""
    values = draw(spec, seed)
    if spec.dtype != torch.float8_e4m3fn:
        return {spec.name: values.to(spec.dtype)}
    weight, scale = quantize_fp8_blocks(values)
    return {spec.name: weight, f"{spec.name}_scale_inv": scale}


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> Iterator[list[TensorSpec]]:
    """Cut the specs, in order, into files of at most ``max_shard_bytes`` (at least one tensor)."""
    shard: list[TensorSpec] = []
    used_bytes = 0
    for spec in specs:
        if shard and used_bytes + spec.stored_bytes > max_shard_bytes:
            yield shard
            shard, used_bytes = [], 0
        shard.append(spec)
        used_bytes += spec.stored_bytes
    if shard:
        yield shard


def write_shards(
    folder: Path, specs: Sequence[TensorSpec], *, seed: int, max_shard_bytes: int
) -> None:
    """Write ``model-0000i-of-0000n.safetensors`` and ``model.safetensors.index.json``.

    Holds one file's tensors in memory at a time.
    """
    from safetensors.torch import save_file

    shards = list(plan_shards(specs, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for spec in shard:
            tensors.update(store(spec, seed))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
