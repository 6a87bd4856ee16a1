"""QuantSpec: what is read, what is refused, and that every refusal tells a way out."""

from __future__ import annotations

import logging
import pickle

import pytest

from sglang_w4afp8.errors import ConfigError, W4AFp8Error
from sglang_w4afp8.spec import ActivationScheme, QuantSpec


def test_defaults_are_those_of_the_published_checkpoints() -> None:
    spec = QuantSpec.from_dict({"quant_method": "w4afp8"})
    assert spec.group_size == 128
    assert spec.weight_block_size == (128, 128)
    assert spec.moe_activation is ActivationScheme.STATIC
    assert spec.ignored_layers == ()
    assert QuantSpec.default() == QuantSpec(origin=QuantSpec.default().origin)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_group_sizes(size: int) -> None:
    assert QuantSpec.from_dict({"group_size": size}).group_size == size


@pytest.mark.parametrize("size", [0, -128, 16, 48, 256, "128", 128.0, None, True])
def test_other_group_sizes_are_refused_with_a_way_out(size: object) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantSpec.from_dict({"group_size": size})
    assert repr(size) in str(caught.value)
    assert caught.value.ways


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"moe_activation_scheme": "static"}, ActivationScheme.STATIC),
        ({"moe_activation_scheme": "dynamic"}, ActivationScheme.DYNAMIC_PER_TOKEN),
        ({"moe_activation_scheme": "dynamic_per_token"}, ActivationScheme.DYNAMIC_PER_TOKEN),
        ({"moe_activation_scheme": "dynamic_per_tensor"}, ActivationScheme.DYNAMIC_PER_TENSOR),
        # What every block-FP8 config says of its linears; the experts stay static.
        ({"activation_scheme": "dynamic"}, ActivationScheme.STATIC),
        ({"activation_scheme": "static"}, ActivationScheme.STATIC),
    ],
)
def test_activation_schemes(config: dict[str, str], scheme: ActivationScheme) -> None:
    assert QuantSpec.from_dict(config).moe_activation is scheme


@pytest.mark.parametrize(
    "config",
    [
        {"moe_activation_scheme": "per_channel"},
        {"activation_scheme": "per_channel"},
        {"linear_activation_scheme": "static"},
        {"activation_scheme": "static", "moe_activation_scheme": "dynamic"},
        {"bits": 8},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": "128x128"},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": ["a"], "ignored_layers": ["a", "b"]},
    ],
)
def test_contradictions_are_refused_on_one_screen(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantSpec.from_dict(config)
    text = str(caught.value)
    assert "Why this cannot work" in text
    assert "(1)" in text
    assert len(text.splitlines()) <= 12


def test_skip_lists_have_several_spellings() -> None:
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        assert QuantSpec.from_dict({key: ["x.y"]}).ignored_layers == ("x.y",)
    both = {"modules_to_not_convert": ["a", "b"], "ignored_layers": ["b", "a"]}
    assert QuantSpec.from_dict(both).ignored_layers == ("a", "b")


def test_unfp8_linears() -> None:
    assert QuantSpec.from_dict({"weight_block_size": None}).weight_block_size is None
    assert QuantSpec.from_dict({"weight_block_size": [64, 32]}).weight_block_size == (64, 32)


def test_unknown_keys_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        QuantSpec.from_dict({"quant_method": "w4afp8", "zebra": 1, "aardvark": 2})
    assert len(caplog.records) == 1
    assert "aardvark, zebra" in caplog.text


def test_known_keys_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        QuantSpec.from_dict({"quant_method": "w4afp8", "fmt": "e4m3", "packed_modules_mapping": {}})
    assert not caplog.records


def test_override() -> None:
    spec = QuantSpec()
    assert spec.with_activation_override("checkpoint") is spec
    assert spec.with_activation_override("none").moe_activation is ActivationScheme.NONE
    dynamic = spec.with_activation_override("dynamic")
    assert dynamic.moe_activation is ActivationScheme.DYNAMIC_PER_TOKEN
    with pytest.raises(ConfigError):
        spec.with_activation_override("fp4")


def test_errors_survive_a_process_boundary() -> None:
    error = ConfigError("found 3", "because", ["do this", "or that"])
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, W4AFp8Error)
    assert str(copy) == str(error)
    assert copy.ways == ("do this", "or that")
