"""Static activation scales from a file: which layer of it a module gets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_w4afp8.checkpoint.act_scales import static_scale
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.spec import QuantSpec

pytestmark = pytest.mark.sglang

LAYER, MTP = "model.layers.1.mlp.experts", "model.layers.2.mlp.experts"


def test_the_mtp_layer_gets_its_own_scales_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module has another name than its tensors, and the draft's config the number of layers."""
    file = tmp_path / "amax.json"
    monkeypatch.setenv("SGLANG_W4AFP8_ACT_SCALES", str(file))

    def scales(prefix: str, layers: int | None, draft: bool = True) -> Any:
        from sglang_w4afp8.srt import host
        from sglang_w4afp8.srt.config import ShardedW4AFp8Config

        text = SimpleNamespace(num_hidden_layers=layers)
        model = SimpleNamespace(hf_text_config=text, is_draft_model=draft)
        with host.building(model):
            config = ShardedW4AFp8Config(QuantSpec())
        text.num_hidden_layers = 1  # as SGLang's MTP models do when they are built
        return config.act_scales_of(prefix)

    amaxes = {f"{LAYER}.w13": 12.5, f"{LAYER}.w2": 3.0}
    file.write_text(json.dumps(amaxes))
    decoder = "model.decoder.mlp.experts"
    last = scales(LAYER, 2, draft=False)
    assert last == {"w13": static_scale(12.5), "w2": static_scale(3.0)}
    for prefix in (decoder, MTP):
        with pytest.raises(ConfigError, match="layer 2 w13, layer 2 w2; ") as error:
            scales(prefix, 2)
        assert "the MTP layer" in error.value.ways[0] and len(error.value.ways) == 3

    file.write_text(json.dumps(amaxes | {f"{MTP}.w13": 7.0, f"{MTP}.w2": 2.0}))
    for prefix in (decoder, MTP):
        assert scales(prefix, 2) == {"w13": static_scale(7.0), "w2": static_scale(2.0)}
    assert scales(LAYER, 2, draft=False) == last
    # The last layer of the file is the MTP layer of no model but one of two layers.
    with pytest.raises(ConfigError, match="layer 3 w13"):
        scales(decoder, 3)
    # Drafts whose layers have numbers of their own, and a decoder of nobody knows how many layers
    for prefix, layers, draft in (
        (LAYER, 2, True),
        ("mtp.layers.0.mlp.experts", 48, True),
        (decoder, 1, True),
        (decoder, None, False),
    ):
        with pytest.raises(ConfigError, match="cannot be told"):
            scales(prefix, layers, draft)
