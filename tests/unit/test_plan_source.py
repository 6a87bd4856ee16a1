"""Where ``plan`` gets a model from: names, bare configs, hub caches, headers; and what they say."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.testing import tiny
from sglang_w4afp8.tools.plan import Layout, make_plan
from sglang_w4afp8.tools.plan_gpus import GPUS, find_gpu
from sglang_w4afp8.tools.plan_model import Model
from sglang_w4afp8.tools.plan_source import built_in, find_model

GOLDEN = Path(__file__).parent / "golden" / "plan-deepseek-r1-tp32-l40s.json"


def call(capsys: Any, *words: object) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_bare_config(tmp_path: Path, capsys: Any) -> None:
    """An FP8 release that is not converted yet: planned as convert would write it."""
    config = dict(next(e["config"] for e in built_in() if "DeepSeek-R1" in e["names"]))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    code, out, _ = call(capsys, path, "--tp", 32, "--gpu", "l40s", "--context", 8192, "--json")
    made, golden = json.loads(out), json.loads(GOLDEN.read_text())
    assert code == 0
    assert made["rank"] == golden["rank"]
    assert "not W4AFP8 (fp8)" in made["model"]["notes"][0]
    assert call(capsys, tmp_path, "--tp", 32, "--gpu", "l40s", "--context", 8192)[0] == 0


def write_checkpoint(folder: Path, model: Model, config: dict[str, Any], **odd: Any) -> None:
    """Headers of a W4AFP8 checkpoint over holes: as long as they say, and empty.

    ``odd``: tensor name → another ``(dtype, shape)``, or None to leave it out.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for linear in model.linears:
        parent = linear.path.rpartition(".")[0]
        sizes = {"fused_qkv_a_proj": (config["q_lora_rank"], model.kv_width)}.get(
            linear.path.rpartition(".")[2], linear.rows
        )
        for layer in linear.layers:
            for part, rows in zip(linear.parts, sizes, strict=True):
                name = f"model.layers.{layer}.{parent}.{part}.weight"
                tensors[name] = ("F8_E4M3", (rows, linear.columns))
    for layer in model.moe_layers:
        for expert in range(model.experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                n, k = model.expert_width, model.hidden
                n, k = (k, n) if part == "down_proj" else (n, k)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                tensors[f"{name}.weight"] = ("I8", (n, k // 2))
                tensors[f"{name}.weight_scale_inv"] = ("BF16", (n, k // 128))
                tensors[f"{name}.input_scale"] = ("F32", (1,))
    tensors = {name: odd.get(name, entry) for name, entry in tensors.items()}
    tensors = {name: entry for name, entry in tensors.items() if entry}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * {"F8_E4M3": 1, "I8": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    folder.mkdir(parents=True)
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def small() -> dict[str, Any]:
    shape = tiny.DeepseekShape(num_hidden_layers=4, n_routed_experts=8)
    config = tiny._deepseek_config(shape, True)
    return config | {
        "quantization_config": {"quant_method": "w4afp8", "weight_block_size": [128, 128]}
    }


def planned(tmp_path: Path, config: dict[str, Any]) -> Model:
    (tmp_path / "bare.json").write_text(json.dumps(config))
    return find_model(str(tmp_path / "bare.json"))


def test_a_hub_cache_folder(tmp_path: Path, small: dict[str, Any], capsys: Any) -> None:
    model = planned(tmp_path, small)
    cache = tmp_path / "models--org--name"
    write_checkpoint(cache / "snapshots" / "abc", model, small)
    (cache / "snapshots" / "aaa").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc\n")
    code, out, _ = call(capsys, cache, "--tp", 8, "--gpu", "h200", "--json")
    made = json.loads(out)
    assert (code, made["model"]["problems"]) == (0, [])
    bare = make_plan(model, Layout(8, 1, 1, GPUS["h200"]))
    assert made["rank"]["weight_bytes"] == bare.rank.nbytes


def test_what_headers_contradict(tmp_path: Path, small: dict[str, Any], capsys: Any) -> None:
    model = planned(tmp_path, small)
    layer = "model.layers.2"
    odd = {
        f"{layer}.self_attn.o_proj.weight": ("BF16", (256, 2048)),
        f"{layer}.self_attn.q_b_proj.weight": ("F8_E4M3", (3072, 128)),
        f"{layer}.mlp.shared_experts.up_proj.weight": None,
        f"{layer}.mlp.experts.1.down_proj.weight": ("I8", (256, 256)),
        f"{layer}.mlp.experts.1.down_proj.input_scale": None,
        f"{layer}.mlp.experts.2.down_proj.weight": None,
    }
    write_checkpoint(tmp_path / "odd", model, small, **odd)
    code, out, _ = call(capsys, tmp_path / "odd", "--tp", 4, "--gpu", "h200")
    assert code == 1
    for wanted in (
        "self_attn.q_b_proj.weight is [3072, 256], [3072, 128], config.json says 256 columns",
        "mlp.shared_experts.up_proj.weight: in 2 of 3 layers",
        "down_proj.weight is [256, 256], config.json makes it [256, 512] (1 tensors)",
        "23 of 24 experts",
        "1 of 72 input scales",
    ):
        assert wanted in out, wanted
    assert "BF16 in 1 layers" in out


def test_sources_that_become_w4afp8_while_loading(tmp_path: Path, small: dict[str, Any]) -> None:
    """Kimi-K2-Thinking's form keeps its groups of 32; asymmetric AWQ has to be converted."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    small["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.(gate|up).*"],
    }  # fmt: skip
    model = planned(tmp_path, small)
    assert (model.spec.group_size, model.spec.weight_block_size) == (32, None)
    assert "while loading" in model.notes[0]
    small["quantization_config"] = {"quant_method": "awq", "zero_point": True}
    model = planned(tmp_path, small)
    assert (model.is_w4afp8, model.spec.group_size) == (False, 128)
    assert "by convert (" in model.notes[0] and "zero point" in model.notes[0]


def test_the_skip_list(tmp_path: Path, small: dict[str, Any]) -> None:
    section = {"modules_to_not_convert": ["model.layers.0", "o_proj", "mlp.gate", "lm_head"]}
    small["quantization_config"] |= section
    fp8 = {linear.path: linear.fp8 for linear in planned(tmp_path, small).linears}
    assert fp8["self_attn.o_proj"] == 0
    assert fp8["self_attn.q_b_proj"] == 3
    assert fp8["mlp.gate_up_proj"] == 0  # its only layer is 0
    assert fp8["mlp.shared_experts.gate_up_proj"] == 3


def test_other_shapes_of_config(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite has no query latent and two shared experts; a multimodal config nests."""
    lite = {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "intermediate_size": 10944, "first_k_dense_replace": 1,
        "vocab_size": 102400, "max_position_embeddings": 163840,
    }  # fmt: skip
    flat = planned(tmp_path, lite)
    assert round(flat.parameters / 1e9, 1) == 15.7
    assert (flat.degrees(), flat.notes) == ([1, 2, 4, 8, 16], [flat.notes[0]])
    nested = planned(tmp_path, {"model_type": "some_vl", "text_config": lite})
    assert nested.parameters == flat.parameters
    assert "language model alone" in nested.notes[-1]
    with pytest.raises(ConfigError, match="dense layers between"):
        planned(tmp_path, lite | {"moe_layer_freq": 2})


def test_old_style_checkpoints(tmp_path: Path, small: dict[str, Any]) -> None:
    """No quantization_config, but hf_quant_config.json: static scales, group 128, FP8 blocks."""
    del small["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(small))
    quantization = {"quantization": {"quant_algo": "MIXED_PRECISION"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    model = find_model(str(tmp_path))
    assert (model.is_w4afp8, model.states_block, model.block) == (True, False, (128, 128))
    (tmp_path / "hf_quant_config.json").unlink()
    model = find_model(str(tmp_path))
    assert (model.is_w4afp8, model.spec.weight_block_size) == (False, None)


def test_what_is_not_known(tmp_path: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "DeepSeek-R7", "--tp", 8)
    assert code == 2
    assert "no built-in model" in err and "(1) one of DeepSeek-R1" in err and "(2)" in err
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="'mamba'"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ConfigError, match="no num_hidden_layers"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        find_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="l40s"):
        find_gpu("rtx")
    assert find_gpu("L40S", 24.0).memory_mib == 24576
