"""The independent judge: Hugging Face transformers on dequantised weights, in float32.

A server can only be trusted against something that shares no code with it. This module therefore
decodes INT4 and FP8 itself, from the checkpoint format's definition, and imports nothing of this
package; transformers then runs the model with its own attention, routing and experts.

Format of an expert weight ``X.weight``: int8 (N, K/2); byte j of a row holds the elements 2j (low
nibble) and 2j+1 (high nibble), both two's complement, -8 to 7; ``X.weight_scale_inv`` (N, K/group)
multiplies. FP8: ``X.weight`` float8_e4m3fn (N, K), ``X.weight_scale_inv`` one per block, the last
block possibly partial. Activation scales (``input_scale``) are not part of the weights: skipped.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEFAULT_GROUP = 128
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Continuation:
    """Greedy continuation of one prompt.

    Attributes:
        token_ids: the chosen tokens.
        logprobs: natural-log probability of each chosen token.
        gaps: logprob of the chosen token minus that of the second best; where it is below the
            error one allows, a different choice is no mistake.
    """

    token_ids: list[int]
    logprobs: list[float]
    gaps: list[float]


class HfJudge:
    """A transformers model on the dequantised weights of a checkpoint folder."""

    def __init__(self, checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Load a BF16, FP8-block or W4AFP8 checkpoint.

        Args:
            checkpoint: folder with config.json and safetensors files.
            dtype: compute dtype; weights are dequantised in float32 and then rounded to it.
        """
        from transformers import AutoModelForCausalLM

        with dequantized_copy(checkpoint, dtype) as folder:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            )
        self.model = model.eval()

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of every next token, (len(token_ids), vocab) float32."""
        with torch.no_grad():
            # No KV cache: one plain forward over the whole text is the simplest thing to trust.
            logits = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def forced(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token of a given text after the ones before it; first token excluded."""
        rows = self.score(token_ids)
        return [rows[i, token].item() for i, token in enumerate(token_ids[1:])]

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> Continuation:
        """Continue a prompt of token ids greedily for exactly ``max_new_tokens`` tokens."""
        text = list(prompt)
        logprobs: list[float] = []
        gaps: list[float] = []
        for _ in range(max_new_tokens):
            best = self.score(text)[-1].topk(2)
            text.append(int(best.indices[0]))
            logprobs.append(best.values[0].item())
            gaps.append((best.values[0] - best.values[1]).item())
        return Continuation(text[len(prompt) :], logprobs, gaps)


@contextmanager
def dequantized_copy(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> Iterator[Path]:
    """A temporary folder with the same model, unquantised: safetensors in ``dtype``, no scales."""
    from safetensors.torch import save_file

    source = Path(checkpoint)
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config", {})
    with tempfile.TemporaryDirectory(prefix="hf-judge-") as name:
        target = Path(name)
        (target / "config.json").write_text(json.dumps(config))
        if (source / "generation_config.json").exists():
            shutil.copy(source / "generation_config.json", target)
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(_dequantized_files(source, quantization, dtype)):
            file = f"part-{number:05d}.safetensors"
            save_file(tensors, target / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        yield target


def _dequantized_files(
    source: Path, quantization: dict[str, Any], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each safetensors file of ``source``, decoded; scales may be in other files."""
    from safetensors import safe_open

    group = int(quantization.get("group_size") or DEFAULT_GROUP)
    block = tuple(quantization.get("weight_block_size") or DEFAULT_BLOCK)
    files: dict[Path, Any] = {
        path: safe_open(path, "pt") for path in sorted(source.glob("*.safetensors"))
    }
    where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
    for path, file in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.endswith(("weight_scale_inv", "input_scale")) or where[name] != path:
                continue
            tensor = file.get_tensor(name)
            scale_name = f"{name}_scale_inv"
            if scale_name in where:
                scale = files[where[scale_name]].get_tensor(scale_name)
                tensor = _decode(name, tensor, scale, group, block)
            elif tensor.dtype in (torch.int8, torch.float8_e4m3fn):
                raise ValueError(f"{name} is {tensor.dtype}, but {scale_name} does not exist")
            tensors[name] = tensor if name.endswith("_bias") else tensor.to(dtype)
        if tensors:
            yield tensors


def _decode(
    name: str, weight: torch.Tensor, scale: torch.Tensor, group: int, block: tuple[int, ...]
) -> torch.Tensor:
    if weight.dtype == torch.int8:
        return int4_to_float(name, weight, scale, group)
    if weight.dtype == torch.float8_e4m3fn:
        return fp8_to_float(name, weight, scale, block)
    raise ValueError(f"{name} has scales, but its dtype {weight.dtype} is neither int8 nor FP8")


def int4_to_float(name: str, weight: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Decode packed INT4: weight int8 (N, K/2), scale (N, K/group) -> float32 (N, K)."""
    rows, half = weight.shape
    if scale.shape != (rows, 2 * half // group) or 2 * half % group:
        raise ValueError(
            f"{name}: {rows} x {2 * half} in groups of {group} needs scales of shape "
            f"({rows}, {2 * half / group:g}), found {tuple(scale.shape)}"
        )
    byte = weight.to(torch.int16) & 0xFF
    nibbles = torch.stack((byte & 0xF, byte >> 4), dim=-1).reshape(rows, 2 * half)
    codes = torch.where(nibbles >= 8, nibbles - 16, nibbles).float()
    # One scale per group: view the row as (groups, group) instead of repeating the scales.
    return (codes.view(rows, -1, group) * scale.float().unsqueeze(-1)).view(rows, 2 * half)


def fp8_to_float(
    name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...]
) -> torch.Tensor:
    """Decode block FP8: weight (N, K), scale (ceil(N/b0), ceil(K/b1)) -> float32 (N, K)."""
    rows, cols = weight.shape
    row_block = torch.arange(rows) // block[0]
    col_block = torch.arange(cols) // block[1]
    if scale.shape != (int(row_block[-1]) + 1, int(col_block[-1]) + 1):
        raise ValueError(
            f"{name}: {rows} x {cols} in blocks of {block[0]} x {block[1]} needs scales of shape "
            f"({int(row_block[-1]) + 1}, {int(col_block[-1]) + 1}), found {tuple(scale.shape)}"
        )
    return weight.float() * scale.float()[row_block][:, col_block]
