"""Fills one layer's expert parameters with this rank's slices, and knows what never arrived.

SGLang's ``FusedMoE.weight_loader`` maps a checkpoint expert to the slots that hold it here (expert
parallelism, EPLB replicas) and then calls ``self._weight_loader_impl`` for each slot, which cuts
and copies. :class:`ExpertLoader` takes that last step's place on the instance: the mapping stays
upstream's, the cutting is :mod:`sglang_w4afp8.sharding`'s. Slices are copied straight from the
file's mapped pages; no whole tensor is ever materialised. Tensors of another format go through
:mod:`.importer` first.

Mirrors ``FusedMoE._weight_loader_impl`` of SGLang 0.5.16 … 0.5.23.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.sharding import ExpertShard
from sglang_w4afp8.srt.importer import ExpertImporter, projection_shape

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SLOT = {"w1": 0, "w3": 1, "w2": 2}
_KINDS = ("weight", "weight_scale_inv", "input_scale")
PART = "w4afp8_part"
"""Attribute of a parameter: what follows the projection in the names of the tensors it takes."""

_CONVERT = "convert the checkpoint: sglang-w4afp8 convert SRC DST"
# Stored dtypes of a projection's codes and scales, and what to say of others.
_STORED = {
    "weight": (
        (torch.int8, torch.uint8),
        "packed INT4 weights are int8, two codes to a byte",
        ("serve it unconverted with the quantization method of its own format",),
    ),
    "weight_scale_inv": (
        (torch.float32, torch.bfloat16, torch.float16),
        "group scales are float32, bfloat16 or float16",
        (),
    ),
}


class ExpertLoader:
    """The loader of one ``FusedMoE`` layer on one rank.

    Args:
        prefix: the layer's name, ``model.layers.3.mlp.experts``; checkpoint names start with it.
        shard: what this rank owns of every expert.
        num_local_experts: slots on this rank.
        first_expert: checkpoint id of slot 0 when experts are placed in order; for messages.
        importer: makes W4AFP8 of another format; None for a W4AFP8 checkpoint.
    """

    def __init__(
        self,
        prefix: str,
        shard: ExpertShard,
        num_local_experts: int,
        first_expert: int = 0,
        importer: ExpertImporter | None = None,
    ) -> None:
        self.prefix = prefix
        self.shard = shard
        self.first_expert = first_expert
        self.importer = importer
        # Parameters by name; an imported tensor fills another one than it arrived for.
        self.parameters: dict[str, torch.nn.Parameter] = {}
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
        elif self.importer is not None:
            self._import(getattr(param, PART), loaded_weight, shard_id, expert_id)
            return
        else:
            kind = "weight_scale_inv" if "scale" in weight_name else "weight"
            self._load_matrix(kind, param, loaded_weight, shard_id, expert_id)
        self.arrived[kind][expert_id, _SLOT[shard_id]] = True

    def _import(self, part: str, loaded: torch.Tensor, shard_id: str, slot: int) -> None:
        assert self.importer is not None
        gemm = "w2" if shard_id == "w2" else "w13"
        device = self.parameters[f"{gemm}_weight"].device
        prefix = self._name(slot, shard_id, "weight").removesuffix(".weight")
        made = self.importer.add(prefix, slot, shard_id, part, loaded, device)
        if made is None:
            return
        for kind, tensor in (("weight", made.packed), ("weight_scale_inv", made.scale)):
            param = self.parameters[f"{gemm}_{kind}"]
            self._copy(kind, param, tensor, shard_id, slot, made.first_row, made.first_column)
            self.arrived[kind][slot, _SLOT[shard_id]] = True

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
        self._check_imported()
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

    def _check_imported(self) -> None:
        """Raise if a projection of a foreign checkpoint came in part, or not at all."""
        if self.importer is None:
            return
        parts = self.importer.source.data_parts
        names = self.missing("weight")
        if not names:
            return
        came = {
            self._name(slot, shard_id, "weight"): found
            for (slot, shard_id), found in self.importer.incomplete().items()
        }
        lacking = [part for part in parts if part not in came.get(names[0], [])]
        raise CheckpointError(
            f"{names[0].removesuffix('weight')}{lacking[0]} is not in the checkpoint ({len(names)} "
            f"of {self.arrived['weight'].numel()} projections of {self.prefix} incomplete on this "
            "rank)",
            f"an expert of this {self.importer.source.kind} checkpoint needs {' and '.join(parts)}",
            [
                "sglang-w4afp8 inspect CHECKPOINT lists everything that is missing",
                "download the checkpoint again if files are missing or truncated",
            ],
        )

    def _name(self, slot: int, shard_id: str, kind: str) -> str:
        return self.tensor_name(slot, _SLOT[shard_id], kind)

    def _load_matrix(
        self,
        kind: str,
        param: torch.nn.Parameter,
        loaded: torch.Tensor,
        shard_id: str,
        slot: int,
    ) -> None:
        """Check a whole projection's codes or scales and copy this rank's slice of them."""
        name = self._name(slot, shard_id, kind)
        dtypes, why, ways = _STORED[kind]
        if loaded.dtype not in dtypes:
            raise CheckpointError(f"{name} has dtype {loaded.dtype}", why, [_CONVERT, *ways])
        rows, columns = projection_shape(self.shard, shard_id)
        if kind == "weight":
            loaded, per_column, meaning = loaded.view(torch.int8), 2, "two codes to a byte"
        else:
            per_column = self.shard.group_size
            meaning = f"group_size {per_column}"
        expected = (rows, columns // per_column)
        if tuple(loaded.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {tuple(loaded.shape)}",
                f"{meaning} makes it {expected} for a projection of {rows} × {columns}",
                [
                    "compare group_size and the sizes in config.json with the checkpoint: "
                    "sglang-w4afp8 inspect CHECKPOINT",
                    _CONVERT,
                ],
            )
        self._copy(kind, param, loaded, shard_id, slot)

    def _copy(
        self,
        kind: str,
        param: torch.nn.Parameter,
        stored: torch.Tensor,
        shard_id: str,
        slot: int,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Copy this rank's slice of a projection's codes or scales.

        Args:
            kind: ``weight`` or ``weight_scale_inv``.
            param: where to.
            stored: the whole projection, or a part of it that holds the slice.
            shard_id: ``w1`` gate, ``w3`` up, ``w2`` down.
            slot: of the layer.
            first_row: row of the whole that row 0 of ``stored`` is.
            first_column: likewise, in weights.
        """
        shard = self.shard
        if shard_id != "w2":  # gate in the first half of the slot's rows, up in the second
            rows = slice(shard.w13_rows.start - first_row, shard.w13_rows.stop - first_row)
            place = _SLOT[shard_id] * shard.columns.size
            param.data[slot, place : place + shard.columns.size].copy_(stored[rows])
        elif kind == "weight":
            first = first_column // 2
            cut = stored[:, shard.w2_bytes.start - first : shard.w2_bytes.stop - first]
            param.data[slot].copy_(cut)
        else:
            columns = torch.tensor(shard.w2_scale_columns) - first_column // shard.group_size
            param.data[slot].copy_(stored[:, columns.to(stored.device)])

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
