"""A config.json as the matrices that ``plan`` cuts.

The layers are those of SGLang's model files (0.5.16 … 0.5.23, ``deepseek_v2.py``,
``glm4_moe.py``, ``qwen3_moe.py``): the fused linears, what is cut by rows or columns and what every
rank holds whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang_w4afp8.checkpoint.load_source import dense_source, read_load_source
from sglang_w4afp8.checkpoint.names import mtp_layers, text_config
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.tools.plan_model import Linear, Model
from sglang_w4afp8.tools.source_tensors import quant_section

KNOWN_TYPES = {
    "deepseek_v2": "MLA",
    "deepseek_v3": "MLA",
    "deepseek_v32": "MLA",
    "kimi_k2": "MLA",
    "glm_moe_dsa": "MLA",
    "glm4_moe": "GQA",
    "qwen3_moe": "GQA",
}


def model_from_config(name: str, source: str, config: Mapping[str, Any]) -> Model:
    """Read a config.json.

    Raises:
        ConfigError: the architecture is none whose layers are known here, or a key is missing.
    """
    text = text_config(config)
    kind = text.get("model_type", config.get("model_type"))
    if kind not in KNOWN_TYPES:
        raise ConfigError(
            f"{source}: model_type {kind!r}",
            f"plan knows the layers of {', '.join(KNOWN_TYPES)}",
            [
                "python -m sglang_w4afp8.srt.shard_check MODEL --tp 8 16 32  loads any W4AFP8 "
                "checkpoint's experts and MLPs as every rank",
                "sglang-w4afp8 inspect MODEL  shows its tensors",
            ],
        )
    try:
        return _build(name, source, config, text, KNOWN_TYPES[kind])
    except KeyError as error:
        raise ConfigError(
            f"{source}: no {error.args[0]}",
            f"a model of type {kind} is described by it",
            ["download config.json again"],
        ) from None


def _build(
    name: str, source: str, config: Mapping[str, Any], text: Mapping[str, Any], attention: str
) -> Model:
    spec, states_block, method, notes = _quantization(dict(config), source)
    if text is not config:
        notes.append("the language model alone: encoders for other inputs are not counted")
    layers = int(text["num_hidden_layers"])
    experts = int(text["num_experts" if "num_experts" in text else "n_routed_experts"])
    dense = int(text.get("first_k_dense_replace", 0))
    if text.get("mlp_only_layers") or max(
        int(text.get("decoder_sparse_step", 1)), int(text.get("moe_layer_freq", 1))
    ) > 1:  # fmt: skip
        raise ConfigError(
            f"{source}: dense layers between the layers with experts",
            "plan knows models whose dense layers come first",
            ["python -m sglang_w4afp8.srt.shard_check MODEL --tp 8 16 32"],
        )
    is_mla = attention == "MLA"
    heads = int(text["num_attention_heads"])
    kv_heads = int(text["num_key_value_heads"])
    head_dim = 0 if is_mla else int(text.get("head_dim") or text["hidden_size"] // heads)
    model = Model(
        name=name, source=source, model_type=text["model_type"], attention=attention,
        hidden=int(text["hidden_size"]), layers=layers, mtp=len(mtp_layers(config)),
        heads=heads, kv_heads=kv_heads,
        kv_width=text["kv_lora_rank"] + text["qk_rope_head_dim"] if is_mla else 2 * head_dim,
        index_head_dim=int(text.get("index_head_dim") or 0),
        absorbed_rows=heads * (text["qk_nope_head_dim"] + text["v_head_dim"]) if is_mla else 0,
        vocab=int(text["vocab_size"]), tied=bool(text.get("tie_word_embeddings")),
        context=int(text["max_position_embeddings"]), experts=experts,
        top_k=int(text["num_experts_per_tok"]), expert_width=int(text["moe_intermediate_size"]),
        moe_layers=range(dense, layers), linears=(), spec=spec, states_block=states_block,
        quant_method=method, notes=notes,
    )  # fmt: skip
    linears = _mla(model, text) if is_mla else _gqa(model, head_dim)
    shared = int(text.get("n_shared_experts") or 0) * model.expert_width
    if shared:
        linears += _mlp("mlp.shared_experts", "shared expert", shared, model.hidden, dense, layers)
    if dense:
        linears += _mlp("mlp", "dense MLP", int(text["intermediate_size"]), model.hidden, 0, dense)
    return replace(model, linears=tuple(_with_format(x, spec) for x in linears))


def _quantization(config: dict[str, Any], source: str) -> tuple[QuantSpec, bool, str, list[str]]:
    """Spec, whether config.json states a block, its quant_method, notes."""
    section = quant_section(config)
    method = str(section.get("quant_method", ""))
    states_block = bool(section.get("weight_block_size"))
    if method == "w4afp8":
        return QuantSpec.from_dict(section, source), states_block, method, []
    why = ""
    try:
        spec = (read_load_source(section) if section else dense_source()).spec
    except ConfigError as error:
        spec, why = QuantSpec(weight_block_size=None), f" ({error.why})"
    block = spec.weight_block_size
    linears = f"FP8 {block[0]}x{block[1]}" if block else "BF16"
    ways = "by convert" + why if why else "while loading, or by convert"
    planned = f"planned as it becomes {ways}: INT4 group {spec.group_size}, {linears} linears"
    return spec, states_block, method, [f"not W4AFP8 ({method or 'unquantised'}): {planned}"]


def _with_format(linear: Linear, spec: QuantSpec) -> Linear:
    """Count the layers in which the linear is FP8, by block size and skip list."""
    if spec.weight_block_size is None or linear.fp8 == 0:
        return replace(linear, fp8=0)
    parent = linear.path.rpartition(".")[0]
    names = [linear.path, *(f"{parent}.{part}" for part in linear.parts)]
    skipped = sum(
        any(
            _covers(entry, f"model.layers.{index}.{name}")
            for entry in spec.ignored_layers
            for name in names
        )
        for index in linear.layers
    )
    return replace(linear, fp8=len(linear.layers) - skipped)


def _covers(entry: str, module: str) -> bool:
    """Whether a skip-list entry names ``module`` or a parent of it, as SGLang matches paths."""
    return f".{entry}." in f".{module}."


def _mla(m: Model, text: Mapping[str, Any]) -> list[Linear]:
    every = range(m.layers)
    rope, nope, v = text["qk_rope_head_dim"], text["qk_nope_head_dim"], text["v_head_dim"]
    latent, q_lora = text["kv_lora_rank"], int(text.get("q_lora_rank") or 0)

    def linear(name: str, rows: int, columns: int, cut: str, *parts: str) -> Linear:
        path = f"self_attn.{name}"
        return Linear(path, "attention", (rows,), columns, cut, parts or (name,), every, m.layers)

    found = []
    if q_lora:
        # SGLang joins two checkpoint tensors to one output, held whole.
        found.append(linear("fused_qkv_a_proj", q_lora + latent + rope, m.hidden, "none",
                            "q_a_proj", "kv_a_proj_with_mqa"))  # fmt: skip
        found.append(linear("q_b_proj", m.heads * (nope + rope), q_lora, "rows"))
    else:
        found.append(linear("q_proj", m.heads * (nope + rope), m.hidden, "rows"))
        found.append(linear("kv_a_proj_with_mqa", latent + rope, m.hidden, "none"))
    found.append(linear("kv_b_proj", m.heads * (nope + v), latent, "rows"))
    found.append(linear("o_proj", m.hidden, m.heads * v, "columns"))
    if m.index_head_dim:
        index_heads = text["index_n_heads"]
        for name, rows, columns, fp8 in (
            ("indexer.wq_b", index_heads * m.index_head_dim, q_lora, m.layers),
            ("indexer.wk", m.index_head_dim, m.hidden, m.layers),
            ("indexer.weights_proj", index_heads, m.hidden, 0),
        ):
            part = name.rpartition(".")[2]
            found.append(Linear(f"self_attn.{name}", "indexer", (rows,), columns, "none", (part,),
                                every, fp8))  # fmt: skip
    return found


def _gqa(m: Model, head_dim: int) -> list[Linear]:
    every = range(m.layers)
    query, key = m.heads * head_dim, m.kv_heads * head_dim
    return [
        Linear("self_attn.qkv_proj", "attention", (query, key, key), m.hidden, "rows",
               ("q_proj", "k_proj", "v_proj"), every, m.layers, m.kv_heads),
        Linear("self_attn.o_proj", "attention", (m.hidden,), query, "columns", ("o_proj",),
               every, m.layers),
    ]  # fmt: skip


def _mlp(path: str, kind: str, width: int, hidden: int, first: int, stop: int) -> list[Linear]:
    layers = range(first, stop)
    return [
        Linear(f"{path}.gate_up_proj", kind, (width, width), hidden, "rows",
               ("gate_proj", "up_proj"), layers, len(layers)),
        Linear(f"{path}.down_proj", kind, (hidden,), width, "columns", ("down_proj",),
               layers, len(layers)),
    ]  # fmt: skip
