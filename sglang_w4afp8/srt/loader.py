"""Fills one layer's expert parameters with this rank's slices, and knows what never arrived.

SGLang's ``FusedMoE.weight_loader`` maps a checkpoint expert to the slots that hold it here (expert
parallelism, EPLB replicas) and then calls ``self._weight_loader_impl`` for each slot, which cuts
and copies. :class:`ExpertLoader` takes that last step's place on the instance: the mapping stays
upstream's, the cutting is :mod:`sglang_w4afp8.sharding`'s. Slices are copied straight from the
file's mapped pages; no whole tensor is ever materialised.

Mirrors ``FusedMoE._weight_loader_impl`` of SGLang 0.5.16 … 0.5.23.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.sharding import ExpertShard

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SLOT = {"w1": 0, "w3": 1, "w2": 2}
_KINDS = ("weight", "weight_scale_inv", "input_scale")

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONVERT = "convert the checkpoint: sglang-w4afp8 convert SRC DST"


class ExpertLoader:
    """The loader of one ``FusedMoE`` layer on one rank.

    Args:
        prefix: the layer's name, ``model.layers.3.mlp.experts``; checkpoint names start with it.
        shard: what this rank owns of every expert.
        num_local_experts: slots on this rank.
        first_expert: checkpoint id of slot 0 when experts are placed in order; for messages.
    """

    def __init__(
        self, prefix: str, shard: ExpertShard, num_local_experts: int, first_expert: int = 0
    ) -> None:
        self.prefix = prefix
        self.shard = shard
        self.first_expert = first_expert
        # arrived[kind][slot, projection]; loader threads write distinct elements.
        self.arrived = {
            kind: torch.zeros(num_local_experts, len(_SLOT), dtype=torch.bool) for kind in _KINDS
        }

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
    ) -> None:
        """Copy this rank's slice of one checkpoint tensor into slot ``expert_id``.

        Args:
            param: ``w13_…`` or ``w2_…`` of the layer, first dimension the slots.
            loaded_weight: the checkpoint's tensor, whole, on any device.
            weight_name: the parameter's name, which tells weight from scale.
            shard_id: ``w1`` gate, ``w3`` up, ``w2`` down.
            expert_id: the slot.

        Raises:
            CheckpointError: the tensor's dtype or shape is not what the config promises.
        """
        if "input_scale" in weight_name:
            kind = "input_scale"
            self._load_input_scale(param, loaded_weight, shard_id, expert_id)
        elif "scale" in weight_name:
            kind = "weight_scale_inv"
            self._load_scale(param, loaded_weight, shard_id, expert_id)
        else:
            kind = "weight"
            self._load_weight(param, loaded_weight, shard_id, expert_id)
        self.arrived[kind][expert_id, _SLOT[shard_id]] = True

    def tensor_name(self, slot: int, projection: int, kind: str) -> str:
        """The checkpoint's name of what belongs into a slot."""
        shard_id = next(key for key, index in _SLOT.items() if index == projection)
        return f"{self.prefix}.{self.first_expert + slot}.{PROJECTIONS[shard_id]}.{kind}"

    def missing(self, kind: str) -> list[str]:
        """Names of the tensors of ``kind`` that have not arrived, in order."""
        gaps = (~self.arrived[kind]).nonzero().tolist()
        return [self.tensor_name(slot, projection, kind) for slot, projection in gaps]

    def has_any(self) -> bool:
        """Whether anything has arrived at all."""
        return any(bool(seen.any()) for seen in self.arrived.values())

    def check_complete(self, needs_input_scale: bool) -> None:
        """Raise if a tensor never arrived.

        Args:
            needs_input_scale: whether the activation scheme reads input scales.

        Raises:
            CheckpointError: naming the first missing tensor and how many are.
        """
        for kind in ("weight", "weight_scale_inv"):
            names = self.missing(kind)
            if names:
                raise CheckpointError(
                    f"{names[0]} is not in the checkpoint "
                    f"({len(names)} of {self.arrived[kind].numel()} {kind} tensors of "
                    f"{self.prefix} missing on this rank)",
                    "without it the expert would compute with uninitialised memory",
                    [
                        "sglang-w4afp8 inspect CHECKPOINT lists everything that is missing",
                        "download the checkpoint again if files are missing or truncated",
                        _CONVERT,
                    ],
                )
        names = self.missing("input_scale") if needs_input_scale else []
        if names:
            raise CheckpointError(
                f"{names[0]} is not in the checkpoint ({len(names)} of "
                f"{self.arrived['input_scale'].numel()} input scales of {self.prefix} missing)",
                "the config asks for static activation scales; SGLang's own method would use 1.0, "
                "which flushes small activations to zero",
                [
                    "SGLANG_W4AFP8_ACTIVATION=dynamic computes a scale per token instead",
                    '"moe_activation_scheme": "dynamic" in config.json says the same for good',
                    "calibrate: sglang-w4afp8 convert SRC DST --act-scales FILE",
                ],
            )

    def _name(self, slot: int, shard_id: str, kind: str) -> str:
        return self.tensor_name(slot, _SLOT[shard_id], kind)

    def _check_shape(
        self, loaded: torch.Tensor, expected: tuple[int, int], name: str, meaning: str
    ) -> None:
        if tuple(loaded.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {tuple(loaded.shape)}",
                f"{meaning} makes it {expected}",
                [
                    "compare group_size and the sizes in config.json with the checkpoint: "
                    "sglang-w4afp8 inspect CHECKPOINT",
                    _CONVERT,
                ],
            )

    def _rows_of(self, param: torch.nn.Parameter, shard_id: str, slot: int) -> torch.Tensor:
        """The slot's rows for gate (first half) or up (second half)."""
        rows = self.shard.columns.size
        offset = 0 if shard_id == "w1" else rows
        return param.data[slot, offset : offset + rows]

    def _load_weight(
        self, param: torch.nn.Parameter, loaded: torch.Tensor, shard_id: str, slot: int
    ) -> None:
        shard = self.shard
        name = self._name(slot, shard_id, "weight")
        if loaded.dtype not in (torch.int8, torch.uint8):
            raise CheckpointError(
                f"{name} has dtype {loaded.dtype}",
                "packed INT4 weights are int8, two codes to a byte",
                [
                    _CONVERT,
                    "serve it unconverted with the quantization method of its own format",
                ],
            )
        loaded = loaded.view(torch.int8)
        full, hidden = shard.columns.full_size, shard.hidden_size
        if shard_id == "w2":
            self._check_shape(
                loaded, (hidden, full // 2), name, f"hidden {hidden} × {full} packed columns"
            )
            param.data[slot].copy_(loaded[:, shard.w2_bytes])
        else:
            self._check_shape(
                loaded, (full, hidden // 2), name, f"{full} rows × hidden {hidden} packed"
            )
            self._rows_of(param, shard_id, slot).copy_(loaded[shard.w13_rows])

    def _load_scale(
        self, param: torch.nn.Parameter, loaded: torch.Tensor, shard_id: str, slot: int
    ) -> None:
        shard = self.shard
        name = self._name(slot, shard_id, "weight_scale_inv")
        if loaded.dtype not in _SCALE_DTYPES:
            raise CheckpointError(
                f"{name} has dtype {loaded.dtype}",
                "group scales are float32, bfloat16 or float16",
                [_CONVERT],
            )
        group, full, hidden = shard.group_size, shard.columns.full_size, shard.hidden_size
        meaning = f"group_size {group}"
        if shard_id == "w2":
            self._check_shape(loaded, (hidden, full // group), name, meaning)
            first, last = shard.w2_scale_columns[0], shard.w2_scale_columns[-1]
            columns = torch.tensor(shard.w2_scale_columns) - first
            covering = loaded[:, first : last + 1]
            param.data[slot].copy_(covering[:, columns.to(covering.device)])
        else:
            self._check_shape(loaded, (full, hidden // group), name, meaning)
            self._rows_of(param, shard_id, slot).copy_(loaded[shard.w13_rows])

    def _load_input_scale(
        self, param: torch.nn.Parameter, loaded: torch.Tensor, shard_id: str, slot: int
    ) -> None:
        name = self._name(slot, shard_id, "input_scale")
        if loaded.numel() != 1:
            raise CheckpointError(
                f"{name} has shape {tuple(loaded.shape)}",
                "a static activation scale is one number per tensor",
                [_CONVERT, "SGLANG_W4AFP8_ACTIVATION=dynamic ignores stored input scales"],
            )
        value = float(loaded)
        if not 0.0 < value < float("inf"):
            raise CheckpointError(
                f"{name} is {value}",
                "an activation scale divides, so it must be positive and finite",
                [_CONVERT, "SGLANG_W4AFP8_ACTIVATION=dynamic ignores stored input scales"],
            )
        if shard_id == "w2":
            param.data[slot] = value
        else:
            param.data[slot, _SLOT[shard_id]] = value
