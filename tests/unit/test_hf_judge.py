"""The judge's own decoders, on values worked out by hand, and its refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from sglang_w4afp8.testing import hf_judge, tiny  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices only wait for each other's threads where cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_int4_low_nibble_first_and_signed():
    # 0x8F: low nibble F = -1, high nibble 8 = -8; 0x70: 0 and 7; 0x21: 1 and 2; 0xC3: 3 and -4.
    weight = torch.tensor([[0x8F - 256, 0x70, 0x21, 0xC3 - 256]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]])
    assert hf_judge.int4_to_float("w", weight, scale, 4).tolist() == [
        [-0.5, -4.0, 0.0, 3.5, 2.0, 4.0, 6.0, -8.0]
    ]


def test_int4_scales_that_do_not_fit_are_refused():
    weight = torch.zeros(2, 96, dtype=torch.int8)  # 192 columns are 1.5 groups of 128
    for scale in (torch.ones(2, 1), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="192 in groups of 128"):
            hf_judge.int4_to_float("w", weight, scale, 128)


def test_fp8_blocks_including_partial_ones():
    weight = torch.arange(1, 16, dtype=torch.float32).view(3, 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    value = hf_judge.fp8_to_float("w", weight, scale, (2, 2))
    assert value.tolist() == [
        [1, 2, 30, 40, 500],
        [6, 7, 80, 90, 1000],
        [22, 24, 260, 280, 3000],
    ]
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        hf_judge.fp8_to_float("w", weight, scale[:1], (2, 2))


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to the tensors of every safetensors file."""
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        change(found)
        save_file(found, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    shape = tiny.QwenShape(moe_intermediate_size=128, num_experts=4, num_hidden_layers=1)
    return tiny.write_qwen(tmp_path_factory.mktemp("judge"), shape)


def quantized_copy(source: Path, target: Path, group: int) -> Path:
    """W4AFP8 experts by round to nearest, and the same values unquantised in ``target/plain``."""
    import shutil

    plain = target / "plain"
    shutil.copytree(source, plain)
    shutil.copytree(source, target / "w4")

    def to_int4(found, packed: bool) -> None:
        for name in [n for n in found if ".experts." in n]:
            rows, cols = found[name].shape
            groups = found[name].float().view(rows, -1, group)
            scale = groups.abs().amax(-1) / 7
            codes = (groups / scale[..., None]).round().view(rows, cols)
            if packed:
                low, high = codes[:, 0::2].int() & 15, codes[:, 1::2].int() & 15
                byte = low + 16 * high
                found[name] = torch.where(byte > 127, byte - 256, byte).to(torch.int8)
                found[f"{name}_scale_inv"] = scale
            else:
                found[name] = (codes.view(groups.shape) * scale[..., None]).view(rows, cols)

    rewrite(plain, lambda found: to_int4(found, packed=False))
    rewrite(target / "w4", lambda found: to_int4(found, packed=True))
    config = json.loads((target / "w4" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "w4afp8", "group_size": group}
    (target / "w4" / "config.json").write_text(json.dumps(config))
    return target / "w4"


@pytest.mark.parametrize("group", [32, 128])
def test_a_w4afp8_checkpoint_is_judged_by_its_dequantised_weights(small, tmp_path, group):
    w4 = quantized_copy(small, tmp_path, group)
    text = list(range(300, 320))
    mine = torch.tensor(hf_judge.HfJudge(w4).forced(text))
    plain = torch.tensor(hf_judge.HfJudge(tmp_path / "plain").forced(text))
    original = torch.tensor(hf_judge.HfJudge(small).forced(text))
    assert torch.equal(mine, plain)
    assert (mine - original).abs().max() > 0.01, "INT4 should be visible at all"


def test_quantised_weights_without_scales_are_refused(small, tmp_path):
    w4 = quantized_copy(small, tmp_path, 128)

    def drop(found) -> None:
        found.pop("model.layers.0.mlp.experts.2.up_proj.weight_scale_inv", None)

    rewrite(w4, drop)
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight_scale_inv does not exist"):
        hf_judge.HfJudge(w4)


def test_greedy_and_forced_agree(small):
    judge = hf_judge.HfJudge(small)
    prompt = [301, 350, 420]
    chosen = judge.greedy(prompt, 5)
    forced = judge.forced(prompt + chosen.token_ids)
    assert forced[len(prompt) - 1 :] == pytest.approx(chosen.logprobs, abs=1e-5)
    rows = judge.score(prompt + chosen.token_ids)
    assert all(math.isclose(row.exp().sum().item(), 1.0, abs_tol=1e-4) for row in rows)
    assert rows[2].argmax() == chosen.token_ids[0]
