"""Checkpoints of other formats become W4AFP8 while SGLang's real FusedMoE loads them.

The judge is the converter: every rank of every layout must hold, bit for bit, what it holds after
loading the converted checkpoint. The layouts include shards that begin in the middle of a scale
group and of an FP8 block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.checkpoint.load_source import dense_source
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.testing.checkpoints import (
    MoeShape,
    tensors_of,
    write_bf16,
    write_checkpoint,
    write_fp8,
)
from sglang_w4afp8.testing.int4_sources import gptq_config, pack_config, to_gptq, to_pack_quantized
from sglang_w4afp8.tools.convert import convert_checkpoint

pytestmark = pytest.mark.sglang

# 384 columns: three groups of 128; tp 4 gives 96, which starts mid-group, tp 8 gives 48.
SHAPE = MoeShape(hidden=256, inner=384, experts=2)
LAYER, MTP = "model.layers.1.mlp.experts", "model.layers.2.mlp.experts"
NAMES = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
# tp, ep, rank. Ranks 1 and 3 of 4, and 1, 2 and 7 of 8, begin in the middle of a group.
RANKS = [(1, 1, 0), (4, 1, 0), (4, 1, 1), (4, 1, 3), (8, 1, 1), (8, 1, 2), (8, 1, 7), (4, 2, 3)]


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "torch")


def quant_of(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def config_of(folder: Path) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    quant = quant_of(folder)
    if quant is None:
        return ShardedW4AFp8Config(source=dense_source())
    return ShardedW4AFp8Config.from_config(quant)


def load(config: Any, tensors: dict[str, torch.Tensor], prefix: str, reverse: bool = False) -> Any:
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    return load_experts(
        config,
        dict(reversed(tensors.items())) if reverse else tensors,
        prefix,
        num_experts=SHAPE.experts,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.inner,
        top_k=2,
        dtype=torch.bfloat16,
    )


def int4_source(folder: Path, kind: str, group: int) -> Path:
    """A symmetric INT4 checkpoint, made of a BF16 one."""
    source = tensors_of(write_bf16(folder.with_name("bf16"), SHAPE))
    make = to_pack_quantized if kind == "pack" else to_gptq
    quant = pack_config(group) if kind == "pack" else gptq_config(group)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        if ".experts." in name:
            tensors |= make(name.removesuffix(".weight"), tensor.float(), group)
        else:
            tensors[name] = tensor
    config = json.loads((folder.with_name("bf16") / "config.json").read_text())
    return write_checkpoint(folder, tensors, {**config, "quantization_config": quant})


def make_source(folder: Path, kind: str) -> Path:
    match kind.split("-"):
        case ["fp8"]:
            return write_fp8(folder, SHAPE)
        case ["fp8", "e8m0"]:
            return write_fp8(folder, SHAPE, power_of_two=True)
        case ["bf16"]:
            return write_bf16(folder, SHAPE)
        case [layout, group]:
            return int4_source(folder, layout, int(group))
    raise AssertionError(kind)


KINDS = ("fp8", "fp8-e8m0", "bf16", "pack-32", "pack-128", "gptq-64", "gptq-128")


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A source and what the converter makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_source(folder / "source", request.param)
    convert_checkpoint(source, folder / "converted")
    yield source, folder / "converted"


def test_every_rank_holds_what_the_converter_writes(pair: tuple[Path, Path]) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source, converted = (tensors_of(folder) for folder in pair)
    for tp, ep, rank in RANKS:
        # The MTP layer is one like the others, with its own name.
        prefix = MTP if rank == 2 else LAYER
        with virtual_rank(rank, tp, ep):
            expected = load(config_of(pair[1]), converted, prefix)
            # The order of tensors within a checkpoint is nobody's promise.
            found = load(config_of(pair[0]), source, prefix, reverse=bool(rank % 2))
        for name in NAMES:
            assert torch.equal(getattr(found, name), getattr(expected, name)), (tp, rank, name)
        assert {name for name, _ in found.named_parameters()} == {
            name for name, _ in expected.named_parameters()
        }


class Streamed(dict[str, torch.Tensor]):
    """Tensors that hold their values until the next one is asked for."""

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        for name, tensor in super().items():
            lent = tensor.clone()
            yield name, lent
            lent.zero_()


@pytest.mark.parametrize("load_format", ["fastsafetensors", "auto"])
def test_buffers_that_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str
) -> None:
    """Where SGLang's reader does so, what waits for its scales is copied; elsewhere it is not."""
    from sglang_w4afp8.srt import host
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source = write_fp8(tmp_path / "source", SHAPE)
    convert_checkpoint(source, tmp_path / "converted")
    monkeypatch.setattr(host, "load_format", lambda: load_format)
    with virtual_rank(1, 4):
        found = load(config_of(source), Streamed(tensors_of(source)), LAYER)
        expected = load(
            config_of(tmp_path / "converted"), tensors_of(tmp_path / "converted"), LAYER
        )
    same = torch.equal(found.w2_weight, expected.w2_weight)
    assert same == (load_format == "fastsafetensors")


def test_the_rounding_method_is_chosen_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source = write_fp8(tmp_path / "source", SHAPE)
    convert_checkpoint(source, tmp_path / "rtn", method="rtn")
    monkeypatch.setenv("SGLANG_W4AFP8_LOAD_METHOD", "rtn")
    with virtual_rank(1, 4):
        expected = load(config_of(tmp_path / "rtn"), tensors_of(tmp_path / "rtn"), LAYER)
        found = load(config_of(source), tensors_of(source), LAYER)
        monkeypatch.setenv("SGLANG_W4AFP8_LOAD_METHOD", "mse")
        other = load(config_of(source), tensors_of(source), LAYER)
    assert torch.equal(found.w2_weight, expected.w2_weight)
    assert not torch.equal(other.w2_weight, expected.w2_weight)


def test_static_scales_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    amaxes = {f"{LAYER}.w13": 12.5, f"{LAYER}.w2": 3.0, f"{MTP}.w13": 7.0, f"{MTP}.w2": 2.0}
    file = tmp_path / "amax.json"
    file.write_text(json.dumps({"amax": amaxes}))
    source = write_fp8(tmp_path / "source", SHAPE)
    convert_checkpoint(source, tmp_path / "static", act_scales=file)
    monkeypatch.delenv("SGLANG_W4AFP8_ACTIVATION")
    monkeypatch.setenv("SGLANG_W4AFP8_ACT_SCALES", str(file))
    with virtual_rank(0, 2):
        found = load(config_of(source), tensors_of(source), LAYER)
        monkeypatch.delenv("SGLANG_W4AFP8_ACT_SCALES")
        expected = load(config_of(tmp_path / "static"), tensors_of(tmp_path / "static"), LAYER)
    for scales in zip(
        found.quant_method.input_scales, expected.quant_method.input_scales, strict=True
    ):
        assert torch.equal(*scales)


def test_a_layer_that_the_source_leaves_alone(tmp_path: Path) -> None:
    """``modules_to_not_convert`` of the source is obeyed; a linear there is not quantised."""
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from sglang_w4afp8.srt.moe import ShardedW4AFp8MoEMethod
    from sglang_w4afp8.srt.virtual_ranks import load_experts, virtual_rank

    source = write_fp8(tmp_path / "source", SHAPE)
    quant = quant_of(source)
    assert quant is not None
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    config = ShardedW4AFp8Config.from_config({**quant, "modules_to_not_convert": [MTP]})
    options: dict[str, Any] = {
        "num_experts": SHAPE.experts,
        "hidden_size": SHAPE.hidden,
        "intermediate_size": SHAPE.inner,
        "top_k": 2,
        "dtype": torch.bfloat16,
    }
    with virtual_rank(0, 1):
        spared = load_experts(config, {}, MTP, **options)
        assert isinstance(spared.quant_method, UnquantizedFusedMoEMethod)
        layer = load(config, tensors_of(source), LAYER)
        assert isinstance(layer.quant_method, ShardedW4AFp8MoEMethod)


@pytest.mark.parametrize("kind", ["fp8", "pack-32", "gptq-64"])
def test_a_missing_part_is_named(tmp_path: Path, kind: str) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source = make_source(tmp_path / "source", kind)
    part = {"fp8": "weight_scale_inv", "pack-32": "weight_packed", "gptq-64": "scales"}[kind]
    tensors = tensors_of(source)
    del tensors[f"{LAYER}.1.down_proj.{part}"]
    with virtual_rank(0, 2), pytest.raises(CheckpointError) as caught:
        load(config_of(source), tensors, LAYER)
    assert f"{LAYER}.1.down_proj.{part} is not in the checkpoint" in str(caught.value)
    assert "1 of 6" in str(caught.value)


def _change(part: str, kind: str) -> dict[str, torch.Tensor]:
    made = {
        "qzeros": torch.full((SHAPE.hidden // 64, SHAPE.inner // 8), 0x67777777, dtype=torch.int32),
        "g_idx": torch.randperm(SHAPE.hidden).to(torch.int32) // 64,
        "weight_zero_point": torch.zeros(SHAPE.inner // 8, 8, dtype=torch.int32),
        "weight_g_idx": torch.arange(SHAPE.hidden, dtype=torch.int32) // 32,
        "weight_shape": torch.tensor([SHAPE.inner - 1, SHAPE.hidden]),
    }
    return {f"{LAYER}.0.gate_proj.{part}": made[part]}


@pytest.mark.parametrize(
    ("kind", "part", "reason"),
    [
        ("gptq-64", "qzeros", "asymmetric"),
        ("gptq-64", "g_idx", "act-order"),
        ("pack-32", "weight_zero_point", "asymmetric"),
        ("pack-32", "weight_g_idx", "permutes the groups"),
        ("pack-32", "weight_shape", "weight_shape"),
    ],
)
def test_tensors_that_break_the_configs_promise(
    tmp_path: Path, kind: str, part: str, reason: str
) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source = make_source(tmp_path / "source", kind)
    tensors = tensors_of(source) | _change(part, kind)
    with virtual_rank(1, 2), pytest.raises(CheckpointError, match=reason) as caught:
        load(config_of(source), tensors, LAYER)
    assert "sglang-w4afp8 convert SRC DST --requantize" in str(caught.value)
    assert f"{LAYER}.0.gate_proj" in str(caught.value)


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    source = write_fp8(tmp_path / "source", MoeShape(hidden=256, inner=256, experts=2))
    with virtual_rank(0, 1), pytest.raises(CheckpointError, match=r"\[384, 256\]"):
        load(config_of(source), tensors_of(source), LAYER)


PACK = pack_config(128)
REFUSED = [
    ({"quant_method": "awq", "bits": 4}, "asymmetric"),
    ({"quant_method": "mxfp4"}, "integer grid"),
    ({"quant_method": "bitsandbytes"}, "neither FP8"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_block_size"),
    ({**gptq_config(128), "sym": False}, "zero point"),
    ({**gptq_config(128), "desc_act": True}, "act-order"),
    ({**gptq_config(128), "bits": 8}, "4-bit"),
    ({**gptq_config(16)}, "groups of 16"),
    ({**PACK, "format": "nvfp4-pack-quantized"}, "pack-quantized"),
]


@pytest.mark.parametrize(("quant", "reason"), REFUSED)
def test_what_cannot_be_exact_is_refused(quant: dict[str, Any], reason: str) -> None:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    with pytest.raises(ConfigError, match=reason) as caught:
        ShardedW4AFp8Config.from_config(quant)
    assert "sglang-w4afp8 convert" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("num_bits", 8, "8-bit"), ("symmetric", False, "zero point"), ("actorder", "group", "permut")],
)
def test_compressed_tensors_that_are_refused(field: str, value: object, reason: str) -> None:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    quant = json.loads(json.dumps(PACK))
    quant["config_groups"]["group_0"]["weights"][field] = value
    with pytest.raises(ConfigError, match=reason):
        ShardedW4AFp8Config.from_config(quant)


def test_linears_that_are_int4_are_refused_and_spared_ones_are_not() -> None:
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from sglang_w4afp8.srt.config import ShardedW4AFp8Config
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    spared, plain = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.other_proj"
    for quant in (PACK, gptq_config(128)):
        config = ShardedW4AFp8Config.from_config(quant)
        with virtual_rank(0, 1):
            layer = ReplicatedLinear(64, 64, quant_config=config, prefix=spared)
            assert isinstance(layer.quant_method, UnquantizedLinearMethod)
            with pytest.raises(ConfigError, match="other_proj is INT4"):
                ReplicatedLinear(64, 64, quant_config=config, prefix=plain)


def test_who_is_claimed() -> None:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    claim = ShardedW4AFp8Config.override_quantization_method
    for method in ("fp8", "compressed-tensors", "gptq", "auto-round", "awq", "mxfp4"):
        assert claim({"quant_method": method}, "w4afp8") == "w4afp8"
        assert claim({"quant_method": method}, None) is None
        assert claim({"quant_method": method}, "fp8") is None
    assert claim({"quant_method": "modelopt"}, "w4afp8") is None
    assert claim(None, "w4afp8") is None


def test_an_old_style_w4afp8_checkpoint_is_none_of_these(tmp_path: Path) -> None:
    """No ``quantization_config``, but hf_quant_config.json: told apart by the model being built."""
    from types import SimpleNamespace

    from sglang_w4afp8.srt import host
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    found = {"quant_method": "w4afp8"}
    for quant, kind in ((found, None), (None, "bf16")):
        model = SimpleNamespace(_parse_quant_hf_config=lambda quant=quant: quant)
        with host.building(model):
            source = ShardedW4AFp8Config().source
        assert (source.kind if source else None) == kind
    assert ShardedW4AFp8Config().source is None
