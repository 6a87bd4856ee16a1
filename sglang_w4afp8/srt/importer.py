"""Turns the experts of a foreign checkpoint into W4AFP8 while they arrive, slice by slice.

SGLang hands over one tensor at a time; a projection is two of them (weight and scale) at least, in
any order and from several threads. The importer keeps a projection's tensors until they are
complete, loads the part that this rank needs (:mod:`sglang_w4afp8.checkpoint.expert_window`),
rounds it where it is no INT4 yet, on the device of the parameters, and hands codes and scales to
the loader. What waits is a view of the file's pages, so memory peaks at one projection of a rank in
float32 above the parameters themselves.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import torch

from sglang_w4afp8 import env
from sglang_w4afp8.checkpoint.expert_window import Window, check_extra, load_window
from sglang_w4afp8.checkpoint.formats import FloatWeight
from sglang_w4afp8.checkpoint.load_source import LoadSource
from sglang_w4afp8.quantize.groups import resize_group_scale
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.sharding import ExpertShard
from sglang_w4afp8.srt import host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Imported:
    """W4AFP8 codes and scales of a part of one projection.

    Attributes:
        packed: ``(n, k/2)`` int8.
        scale: ``(n, k/group)`` bfloat16.
        first_row: row of the whole that row 0 is.
        first_column: likewise, of the unpacked columns.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    first_row: int
    first_column: int


def projection_shape(shard: ExpertShard, shard_id: str) -> tuple[int, int]:
    """Rows and columns of a whole projection: ``w1`` gate, ``w3`` up, ``w2`` down."""
    full, hidden = shard.columns.full_size, shard.hidden_size
    return (hidden, full) if shard_id == "w2" else (full, hidden)


class ExpertImporter:
    """One per layer.

    Args:
        source: what the checkpoint is.
        shard: what this rank owns of every expert.
    """

    def __init__(self, source: LoadSource, shard: ExpertShard) -> None:
        self.source = source
        self.shard = shard
        self.method = env.LOAD_METHOD.get()
        self._copies = host.reuses_buffers()
        self._waiting: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def add(
        self,
        prefix: str,
        slot: int,
        shard_id: str,
        part: str,
        tensor: torch.Tensor,
        device: torch.device,
    ) -> Imported | None:
        """Take a tensor; the projection's W4AFP8 form once it is complete.

        Args:
            prefix: ``…experts.5.gate_proj``.
            slot: of this layer on this rank.
            shard_id: ``w1`` gate, ``w3`` up, ``w2`` down.
            part: what follows ``prefix`` in the tensor's name.
            tensor: whole.
            device: where to round.

        Raises:
            CheckpointError: the projection cannot become W4AFP8.
        """
        shape = projection_shape(self.shard, shard_id)
        if part not in self.source.data_parts:
            check_extra(prefix, part, tensor, shape, self.source.quant)
            return None
        if self._copies:
            tensor = tensor.clone()
        with self._lock:
            tensors = self._waiting.setdefault((slot, shard_id), {})
            tensors[part] = tensor
            if not self._is_complete(tensors):
                return None
            del self._waiting[slot, shard_id]
        return self._make(prefix, shape, shard_id, tensors, device)

    def incomplete(self) -> dict[tuple[int, str], list[str]]:
        """``(slot, shard_id)`` → the parts that came, of projections that miss others."""
        return {key: sorted(tensors) for key, tensors in self._waiting.items()}

    def _is_complete(self, tensors: dict[str, torch.Tensor]) -> bool:
        weight = tensors.get("weight")
        if weight is not None and weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
            return True  # a layer that an FP8 checkpoint leaves unquantised
        return all(part in tensors for part in self.source.data_parts)

    def _make(
        self,
        prefix: str,
        shape: tuple[int, int],
        shard_id: str,
        tensors: dict[str, torch.Tensor],
        device: torch.device,
    ) -> Imported:
        own = self.shard.w13_rows
        whole_n, whole_k = slice(0, shape[0]), slice(0, shape[1])
        rows, columns = (whole_n, own) if shard_id == "w2" else (own, whole_k)
        group = self.shard.group_size
        block = self.source.spec.weight_block_size if "weight_scale_inv" in tensors else None
        window = Window.around(shape, rows, columns, group, block, tensors)
        weight = load_window(prefix, tensors, self.source.quant, window, block)
        if isinstance(weight, FloatWeight):
            packed, scale, _ = quantize_weight(
                weight.data.to(device),
                None if weight.scale is None else weight.scale.to(device),
                weight.block,
                method=self.method,
                group_size=group,
                name=prefix,
            )
        else:
            packed = weight.packed
            scale = resize_group_scale(weight.scale, weight.group_size, group)
        return Imported(packed, scale, window.rows.start, window.columns.start)
