"""Small but complete Hugging Face checkpoints, for tests, demonstrations and trying a TP degree.

Two architectures, both as their makers publish them:

* ``write_deepseek``: DeepSeek-V3 (MLA with a compressed query, YaRN, dense first layer, shared
  expert, sigmoid routing in groups with a correction bias, FP8 weights in 128x128 blocks),
* ``write_qwen``: Qwen3-MoE (grouped-query attention with q/k norms, softmax routing, BF16).

The folder has sharded safetensors with an index, config.json, generation_config.json and a real
tokenizer, and is a function of (shape, seed) only. Weights are scaled so that every block moves the
residual stream about as much as it holds, routing is decided clearly, and logits have a standard
deviation of about 6: greedy decoding then rarely meets a near-tie (best and second token closer
than 0.01 in log-probability), and a wrong expert weight shows in the output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.testing.tiny_tokenizer import MIN_VOCAB, write_tokenizer
from sglang_w4afp8.testing.tiny_weights import TensorSpec, write_shards

MAX_SHARD_BYTES = 4 << 20
_FP8 = torch.float8_e4m3fn
_LOGIT_STD = 6.0
_ROUTER_STD = 1.5


@dataclass(frozen=True)
class DeepseekShape:
    """Dimensions of a DeepSeek-V3 checkpoint; the names are those of config.json where they exist.

    The defaults divide into whole 128-blocks at TP 1, 2, 4 and 8: every column-parallel output and
    every row-parallel input is a multiple of 1024.
    """

    vocab_size: int = 512
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 16
    q_lora_rank: int = 256
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 1024
    moe_intermediate_size: int = 1024
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096

    @classmethod
    def unaligned(cls, *, tp: int, expert: int = 192, dense: int = 320) -> DeepseekShape:
        """A shape whose MLP shards are not whole blocks at this TP degree.

        Args:
            tp: tensor-parallel degree.
            expert: intermediate width per rank of routed and shared experts.
            dense: intermediate width per rank of the dense layers.

        Attention stays aligned (upstream's linears serve it). The widths that hurt in practice are
        64 (2048 at TP32), 192 (1536 at TP8), 320 (2560 at TP8) and 176 (1408 at TP8).
        """
        return cls(moe_intermediate_size=expert * tp, intermediate_size=dense * tp)


@dataclass(frozen=True)
class QwenShape:
    """Dimensions of a Qwen3-MoE checkpoint; the names are those of config.json.

    The defaults give expert shards of whole 128-groups at TP 1, 2, 4 and 8. At TP 8 there are more
    ranks than KV heads, so heads are replicated, as with the published models.
    """

    vocab_size: int = 512
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    moe_intermediate_size: int = 1024
    num_experts: int = 16
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 4096

    @classmethod
    def unaligned(cls, *, tp: int, expert: int = 192) -> QwenShape:
        """A shape whose experts are ``expert`` wide per rank at this TP degree."""
        return cls(moe_intermediate_size=expert * tp)


def write_deepseek(
    folder: str | Path,
    shape: DeepseekShape | None = None,
    *,
    seed: int = 0,
    fp8: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a DeepSeek-V3 checkpoint.

    Args:
        folder: created if missing; files of the same names are overwritten.
        shape: dimensions; default ``DeepseekShape()`` (about 14 million parameters).
        seed: any integer; the same seed gives the same bytes.
        fp8: linears and experts as FP8 with 128x128 scales (as published), or all in BF16.
        max_shard_bytes: upper size of one safetensors file.

    Returns:
        The folder.
    """
    shape = shape or DeepseekShape()
    specs = list(_deepseek_specs(shape, _FP8 if fp8 else torch.bfloat16))
    return _write(folder, specs, _deepseek_config(shape, fp8), seed, max_shard_bytes)


def write_qwen(
    folder: str | Path,
    shape: QwenShape | None = None,
    *,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a Qwen3-MoE checkpoint in BF16; arguments as in ``write_deepseek``."""
    shape = shape or QwenShape()
    specs = list(_qwen_specs(shape))
    return _write(folder, specs, _qwen_config(shape), seed, max_shard_bytes)


def _write(
    folder: str | Path,
    specs: list[TensorSpec],
    config: dict[str, Any],
    seed: int,
    max_shard_bytes: int,
) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Token 0 ends a text; temperature 0 would be refused by transformers, hence do_sample.
    generation = {"do_sample": False, "eos_token_id": 0, "pad_token_id": 1}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(
        path, vocab_size=config["vocab_size"], max_length=config["max_position_embeddings"]
    )
    write_shards(path, specs, seed=seed, max_shard_bytes=max_shard_bytes)
    return path


# ------------------------------------------------------------------------------------- tensors


def _linear(name: str, rows: int, cols: int, dtype: torch.dtype, gain: float = 1.0) -> TensorSpec:
    """A weight (rows, cols) that maps inputs of unit variance to outputs of deviation ``gain``."""
    return TensorSpec(f"{name}.weight", (rows, cols), gain / math.sqrt(cols), dtype=dtype)


def _norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (size,), 0.1, mean=1.0)


def _mlp(name: str, hidden: int, inner: int, dtype: torch.dtype) -> Iterator[TensorSpec]:
    yield _linear(f"{name}.gate_proj", inner, hidden, dtype)
    yield _linear(f"{name}.up_proj", inner, hidden, dtype)
    # silu(gate) * up has a standard deviation of about 0.6; bring the output back to about 1.
    yield _linear(f"{name}.down_proj", hidden, inner, dtype, gain=1.7)


def _ends(vocab: int, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec("model.embed_tokens.weight", (vocab, hidden), 1.0)
    yield _norm("model.norm", hidden)
    yield _lm_head("lm_head.weight", vocab, hidden)


def _lm_head(name: str, vocab: int, hidden: int) -> TensorSpec:
    return TensorSpec(name, (vocab, hidden), _LOGIT_STD / math.sqrt(hidden), quiet_rows=MIN_VOCAB)


def _deepseek_specs(s: DeepseekShape, dtype: torch.dtype) -> Iterator[TensorSpec]:
    yield from _ends(s.vocab_size, s.hidden_size)
    for layer in range(s.num_hidden_layers):
        yield from _deepseek_layer(f"model.layers.{layer}", layer, s, dtype)
    for layer in range(s.num_hidden_layers, s.num_hidden_layers + s.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.embed_tokens.weight", (s.vocab_size, s.hidden_size), 1.0)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield _norm(f"{prefix}.{name}", s.hidden_size)
        bf16 = torch.bfloat16  # the published model keeps the MTP layer's own matrices in BF16
        yield _linear(f"{prefix}.eh_proj", s.hidden_size, 2 * s.hidden_size, bf16)
        yield _lm_head(f"{prefix}.shared_head.head.weight", s.vocab_size, s.hidden_size)
        yield from _deepseek_layer(prefix, layer, s, dtype)


def _deepseek_layer(
    prefix: str, layer: int, s: DeepseekShape, dtype: torch.dtype
) -> Iterator[TensorSpec]:
    hidden, heads = s.hidden_size, s.num_attention_heads
    head_out = s.qk_nope_head_dim + s.qk_rope_head_dim
    attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    yield _norm(f"{prefix}.input_layernorm", hidden)
    yield _norm(f"{prefix}.post_attention_layernorm", hidden)
    yield _linear(f"{attn}.q_a_proj", s.q_lora_rank, hidden, dtype)
    yield _norm(f"{attn}.q_a_layernorm", s.q_lora_rank)
    yield _linear(f"{attn}.q_b_proj", heads * head_out, s.q_lora_rank, dtype)
    latent = s.kv_lora_rank + s.qk_rope_head_dim
    yield _linear(f"{attn}.kv_a_proj_with_mqa", latent, hidden, dtype)
    yield _norm(f"{attn}.kv_a_layernorm", s.kv_lora_rank)
    kv_out = heads * (s.qk_nope_head_dim + s.v_head_dim)
    yield _linear(f"{attn}.kv_b_proj", kv_out, s.kv_lora_rank, dtype)
    # Attention averages values, which shrinks them; the gain keeps the context visible.
    yield _linear(f"{attn}.o_proj", hidden, heads * s.v_head_dim, dtype, gain=2.0)
    if layer < s.first_k_dense_replace:
        yield from _mlp(mlp, hidden, s.intermediate_size, dtype)
        return
    experts = s.n_routed_experts
    yield _linear(f"{mlp}.gate", experts, hidden, torch.bfloat16, gain=_ROUTER_STD)
    bias = f"{mlp}.gate.e_score_correction_bias"
    yield TensorSpec(bias, (experts,), 0.1, dtype=torch.float32)
    shared = s.moe_intermediate_size * s.n_shared_experts
    if shared:
        yield from _mlp(f"{mlp}.shared_experts", hidden, shared, dtype)
    for expert in range(experts):
        yield from _mlp(f"{mlp}.experts.{expert}", hidden, s.moe_intermediate_size, dtype)


def _qwen_specs(s: QwenShape) -> Iterator[TensorSpec]:
    bf16, hidden, heads_out = torch.bfloat16, s.hidden_size, s.num_attention_heads * s.head_dim
    yield from _ends(s.vocab_size, hidden)
    for layer in range(s.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attn = f"{prefix}.self_attn"
        yield _norm(f"{prefix}.input_layernorm", hidden)
        yield _norm(f"{prefix}.post_attention_layernorm", hidden)
        yield _linear(f"{attn}.q_proj", heads_out, hidden, bf16)
        for name in ("k_proj", "v_proj"):
            yield _linear(f"{attn}.{name}", s.num_key_value_heads * s.head_dim, hidden, bf16)
        yield _norm(f"{attn}.q_norm", s.head_dim)
        yield _norm(f"{attn}.k_norm", s.head_dim)
        yield _linear(f"{attn}.o_proj", hidden, heads_out, bf16, gain=2.0)
        yield _linear(f"{prefix}.mlp.gate", s.num_experts, hidden, bf16, gain=_ROUTER_STD)
        for expert in range(s.num_experts):
            name = f"{prefix}.mlp.experts.{expert}"
            yield from _mlp(name, hidden, s.moe_intermediate_size, bf16)


# ------------------------------------------------------------------------------------- configs


def _common_config() -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _deepseek_config(s: DeepseekShape, fp8: bool) -> dict[str, Any]:
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **_common_config(),
        **s.__dict__,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": s.num_attention_heads,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": s.max_position_embeddings // 4,
        },
        "rope_theta": 10000.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return config


def _qwen_config(s: QwenShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_common_config(),
        **s.__dict__,
        "decoder_sparse_step": 1,
        "intermediate_size": 4 * s.hidden_size,
        "max_window_layers": s.num_hidden_layers,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    }
