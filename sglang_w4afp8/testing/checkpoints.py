"""Hand-sized MoE checkpoints in every source format, for tests of the checkpoint tools.

Unlike :mod:`.tiny` these are not meant to be served: they have the tensors that matter to a
converter (dense layer, MoE layers, shared expert, router, attention, MTP layer, norms) in awkward
arrangements that real checkpoints have too: scales in another shard than their weight, no index,
ragged last blocks, E8M0 scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.checkpoint.index import INDEX_NAME
from sglang_w4afp8.reference import FP8_MAX

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class MoeShape:
    """Dimensions of a toy MoE model; layer 0 is dense, ``layers`` counts it, MTP comes on top."""

    hidden: int = 256
    inner: int = 256
    experts: int = 4
    layers: int = 2
    mtp: int = 1
    model_type: str = "deepseek_v3"


def to_fp8_blocks(
    weight: torch.Tensor, block: tuple[int, int] = (128, 128), *, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-FP8 of a float matrix, the last block of an axis possibly ragged.

    Args:
        weight: ``(N, K)`` float.
        block: ``(n, k)``.
        power_of_two: E8M0 scales, as DeepSeek-V3.1 has them.

    Returns:
        ``(N, K)`` float8_e4m3fn and ``(ceil(N/n), ceil(K/k))`` float32 or float8_e8m0fnu.
    """
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight
    blocks = padded.view(grid[0], block[0], grid[1], block[1])
    scale = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp(min=1e-12)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    stored = scale.to(torch.float8_e8m0fnu) if power_of_two else scale
    return codes.contiguous().to(FP8), stored


def float_weights(shape: MoeShape, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of the model in float32: heavy-tailed experts, Gaussian everything else."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.05

    def heavy(*size: int) -> torch.Tensor:
        # Student t with 5 degrees of freedom: normal over the root of a mean of squares.
        spread = torch.randn(5, *size, generator=generator).square().mean(dim=0).sqrt()
        return normal(*size) / spread

    hidden, inner = shape.hidden, shape.inner
    made = {"model.embed_tokens.weight": normal(64, hidden)}
    for layer in range(shape.layers + shape.mtp):
        prefix = f"model.layers.{layer}"
        made[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden)
        made[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, hidden)
        if layer == 0:
            made[f"{prefix}.mlp.gate_proj.weight"] = normal(inner + 64, hidden)
            continue
        made[f"{prefix}.mlp.gate.weight"] = normal(shape.experts, hidden)
        made[f"{prefix}.mlp.shared_experts.up_proj.weight"] = normal(inner, hidden)
        for expert in range(shape.experts):
            place = f"{prefix}.mlp.experts.{expert}"
            made[f"{place}.gate_proj.weight"] = heavy(inner, hidden)
            made[f"{place}.up_proj.weight"] = heavy(inner, hidden)
            made[f"{place}.down_proj.weight"] = heavy(hidden, inner)
        if layer >= shape.layers:
            made[f"{prefix}.eh_proj.weight"] = normal(hidden, 2 * hidden)
    made["model.norm.weight"] = torch.ones(hidden)
    made["lm_head.weight"] = normal(64, hidden)
    return made


def is_quantised_linear(name: str) -> bool:
    """Whether a published FP8 checkpoint stores this tensor in FP8."""
    return "_proj.weight" in name and "eh_proj" not in name


def model_config(shape: MoeShape, quant: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of the toy model."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.inner,
        "n_routed_experts": shape.experts,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": shape.mtp,
    }
    if quant is not None:
        config["quantization_config"] = dict(quant)
    return config


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    shards: int = 3,
    with_index: bool = True,
    scales_apart: bool = False,
) -> Path:
    """Write tensors as a Hugging Face checkpoint.

    Args:
        folder: created.
        tensors: contiguous CPU tensors.
        config: config.json.
        shards: number of files.
        with_index: write ``model.safetensors.index.json``.
        scales_apart: store every scale one shard after its weight, so that pairs are split.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place: dict[str, int] = {}
    weights = [name for name in tensors if "scale" not in name]
    for i, name in enumerate(weights):
        place[name] = i * shards // len(weights)
    for name in tensors:
        if name not in place:
            owner = next((w for w in weights if name.startswith(w)), weights[0])
            place[name] = (place[owner] + scales_apart) % shards
    for i, file in enumerate(names):
        part = {name: tensors[name].contiguous() for name in tensors if place[name] == i}
        save_file(part, folder / file, metadata={"format": "pt"})
    if with_index:
        weight_map = {name: names[place[name]] for name in tensors}
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_bf16(folder: Path, shape: MoeShape | None = None, **how: Any) -> Path:
    """A BF16 checkpoint; keyword arguments as in :func:`write_checkpoint`."""
    shape = shape or MoeShape()
    tensors = {name: w.to(torch.bfloat16) for name, w in float_weights(shape).items()}
    return write_checkpoint(folder, tensors, model_config(shape), **how)


def write_fp8(
    folder: Path, shape: MoeShape | None = None, *, power_of_two: bool = False, **how: Any
) -> Path:
    """A DeepSeek-style FP8 checkpoint; keyword arguments as in :func:`write_checkpoint`."""
    shape = shape or MoeShape()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in float_weights(shape).items():
        if is_quantised_linear(name):
            codes, scale = to_fp8_blocks(weight, power_of_two=power_of_two)
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight.to(torch.bfloat16)
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return write_checkpoint(folder, tensors, model_config(shape, quant), **how)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as the safetensors library reads it."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bytes_of_files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by relative path: to see whether anything changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
