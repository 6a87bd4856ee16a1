"""The grammar of tensor names: which tensor is a routed expert's, and what the others are.

Owns the mapping between names and (layer, expert, projection, part), and the class shown in
``inspect`` and in reports. Knows nothing of dtypes, shapes or files. The names are those of
Hugging Face checkpoints as SGLang's model files read them: ``gate_proj/up_proj/down_proj`` in most
families, ``w1/w3/w2`` in Mixtral-like ones and DeepSeek-V4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GATE, UP, DOWN = "gate", "up", "down"
PROJECTIONS = (GATE, UP, DOWN)

_SPELLINGS = {
    "gate_proj": GATE,
    "up_proj": UP,
    "down_proj": DOWN,
    "w1": GATE,
    "w3": UP,
    "w2": DOWN,
}
# gate and up share their input, hence their activation scale: SGLang keeps them as one GEMM, w13.
GEMM_OF = {GATE: "w13", UP: "w13", DOWN: "w2"}
W_SPELLING = {GATE: "w1", UP: "w3", DOWN: "w2"}
PROJ_SPELLING = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}

_EXPERT = re.compile(
    r"^(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts)\.(?P<expert>\d+)\."
    r"(?P<spelling>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<part>.+)$"
)
_FUSED_EXPERT = re.compile(
    r"^(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts)\."
    r"(?P<spelling>gate_up_proj|gate_proj|up_proj|down_proj|w13|w2)(?P<part>[._].+)?$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

# How many MTP (next-token prediction) layers follow the last decoder layer, by config key.
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

# DeepSeek's loader and TensorRT-LLM spell static scales w1/w2/w3.input_scale. Every other SGLang
# loader knows only gate_proj/up_proj/down_proj.input_scale and would drop the w-names silently.
_W_SCALE_MODEL_TYPES = frozenset(
    {"deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "glm_moe_dsa"}
)


@dataclass(frozen=True)
class ExpertName:
    """A parsed routed-expert tensor name.

    Attributes:
        module: path up to and including ``experts``, e.g. ``model.layers.3.mlp.experts``.
        layer: index of the decoder layer; MTP layers follow the last ordinary one.
        expert: index of the expert in its layer.
        projection: ``gate``, ``up`` or ``down``.
        spelling: the projection as written in the name.
        part: what follows it, e.g. ``weight`` or ``weight_scale_inv``.
    """

    module: str
    layer: int
    expert: int
    projection: str
    spelling: str
    part: str

    @property
    def prefix(self) -> str:
        """Name of the linear, without the part: ``…experts.5.gate_proj``."""
        return f"{self.module}.{self.expert}.{self.spelling}"


def parse_expert(name: str) -> ExpertName | None:
    """Parse a routed expert's tensor name; ``None`` for any other tensor."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    return ExpertName(
        module=match["module"],
        layer=int(match["layer"]),
        expert=int(match["expert"]),
        projection=_SPELLINGS[match["spelling"]],
        spelling=match["spelling"],
        part=match["part"],
    )


def is_fused_expert(name: str) -> bool:
    """Whether the tensor holds all experts of a layer at once (three-dimensional storage)."""
    return _EXPERT.match(name) is None and _FUSED_EXPERT.match(name) is not None


def layer_of(name: str) -> int | None:
    """Decoder layer index in a tensor name, or ``None`` outside the layer stack."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json (multimodal models nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def mtp_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Indices of the multi-token-prediction layers that ``config.json`` announces."""
    text = text_config(config)
    count = next((int(text[key]) for key in _MTP_KEYS if text.get(key)), 0)
    first = text.get("num_hidden_layers")
    if not count or not isinstance(first, int):
        return frozenset()
    return frozenset(range(first, first + count))


def classify(name: str, mtp: Iterable[int] = ()) -> str:
    """Class of a tensor for tables and reports.

    Returns one of ``experts``, ``mtp experts``, ``mtp other``, ``shared experts``, ``router``,
    ``attention``, ``dense mlp``, ``norm``, ``embedding``, ``lm_head``, ``other``.
    """
    is_mtp = layer_of(name) in set(mtp) or name.startswith("mtp.")
    if parse_expert(name) is not None or is_fused_expert(name):
        return "mtp experts" if is_mtp else "experts"
    if is_mtp:
        return "mtp other"
    if "shared_expert" in name:
        return "shared experts"
    if re.search(r"\.(gate|router)\.(weight|bias|e_score_correction_bias|wg)", name):
        return "router"
    if re.search(r"\.(self_attn|attn|attention|linear_attn)\.", name) and "norm" not in name:
        return "attention"
    if "norm" in name:
        return "norm"
    if re.search(r"\.(mlp|ffn|feed_forward)\.", name):
        return "dense mlp"
    if "embed" in name:
        return "embedding"
    if "lm_head" in name or name.startswith("head."):
        return "lm_head"
    return "other"


def uses_w_scale_names(config: Mapping[str, Any]) -> bool:
    """Whether this model's loader wants ``w1/w2/w3.input_scale`` (see the table above)."""
    return text_config(config).get("model_type") in _W_SCALE_MODEL_TYPES


def input_scale_name(module: str, expert: int, projection: str, *, w_names: bool) -> str:
    """Name of the static activation scale of one expert projection.

    Args:
        module: path up to ``experts``.
        expert: expert index.
        projection: ``gate``, ``up`` or ``down``.
        w_names: DeepSeek spelling, see :func:`uses_w_scale_names`.
    """
    spelling = (W_SPELLING if w_names else PROJ_SPELLING)[projection]
    return f"{module}.{expert}.{spelling}.input_scale"
