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
from sglang_w4afp8.srt.importer import ExpertImporter, Imported

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SLOT = {"w1": 0, "w3": 1, "w2": 2}
_KINDS = ("weight", "weight_scale_inv", "input_scale")
PART = "w4afp8_part"
"""Attribute of a parameter: what follows the projection in the names of the tensors it takes."""

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONVERT = "convert the checkpoint: sglang-w4afp8 convert SRC DST"


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
        elif "scale" in weight_name:
            kind = "weight_scale_inv"
            self._load_scale(param, loaded_weight, shard_id, expert_id)
        else:
            kind = "weight"
            self._load_weight(param, loaded_weight, shard_id, expert_id)
        self.arrived[kind][expert_id, _SLOT[shard_id]] = True

    def _import(self, part: str, loaded: torch.Tensor, shard_id: str, slot: int) -> None:
        assert self.importer is not None
        gemm = "w2" if shard_id == "w2" else "w13"
        weight = self.parameters[f"{gemm}_weight"]
        scale = self.parameters[f"{gemm}_weight_scale_inv"]
        prefix = self._name(slot, shard_id, "weight").removesuffix(".weight")
        made = self.importer.add(prefix, slot, shard_id, part, loaded, weight.device)
        if made is None:
            return
        self._copy_weight(weight, made.packed, shard_id, slot, made)
        self._copy_scale(scale, made.scale, shard_id, slot, made)
        for kind in ("weight", "weight_scale_inv"):
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
        else:
            self._check_shape(
                loaded, (full, hidden // 2), name, f"{full} rows × hidden {hidden} packed"
            )
        self._copy_weight(param, loaded, shard_id, slot)

    def _copy_weight(
        self,
        param: torch.nn.Parameter,
        packed: torch.Tensor,
        shard_id: str,
        slot: int,
        part: Imported | None = None,
    ) -> None:
        """Copy this rank's slice of packed codes, a whole projection's or a part's."""
        shard = self.shard
        if shard_id == "w2":
            first = part.first_column // 2 if part else 0
            cut = packed[:, shard.w2_bytes.start - first : shard.w2_bytes.stop - first]
            param.data[slot].copy_(cut)
        else:
            first = part.first_row if part else 0
            cut = packed[shard.w13_rows.start - first : shard.w13_rows.stop - first]
            self._rows_of(param, shard_id, slot).copy_(cut)

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
        else:
            self._check_shape(loaded, (full, hidden // group), name, meaning)
        self._copy_scale(param, loaded, shard_id, slot)

    def _copy_scale(
        self,
        param: torch.nn.Parameter,
        scale: torch.Tensor,
        shard_id: str,
        slot: int,
        part: Imported | None = None,
    ) -> None:
        """Copy this rank's scales, out of a whole projection's or a part's."""
        shard = self.shard
        if shard_id == "w2":
            offset = part.first_column // shard.group_size if part else 0
            first, last = shard.w2_scale_columns[0], shard.w2_scale_columns[-1]
            columns = torch.tensor(shard.w2_scale_columns) - first
            covering = scale[:, first - offset : last + 1 - offset]
            param.data[slot].copy_(covering[:, columns.to(covering.device)])
        else:
            first = part.first_row if part else 0
            cut = scale[shard.w13_rows.start - first : shard.w13_rows.stop - first]
            self._rows_of(param, shard_id, slot).copy_(cut)

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
