"""The tiny checkpoints: complete, deterministic, and hard enough to show mistakes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402

from sglang_w4afp8.errors import ConfigError  # noqa: E402
from sglang_w4afp8.testing import tiny, tiny_weights  # noqa: E402
from sglang_w4afp8.testing.tiny_tokenizer import MIN_VOCAB, write_tokenizer  # noqa: E402
from sglang_w4afp8.testing.tiny_weights import TensorSpec  # noqa: E402

SMALL_DEEPSEEK = tiny.DeepseekShape(
    moe_intermediate_size=128, intermediate_size=192, n_routed_experts=8, num_hidden_layers=2
)
SMALL_QWEN = tiny.QwenShape(moe_intermediate_size=128, num_experts=4, num_hidden_layers=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices only wait for each other's threads where cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("write", "shape"),
    [(tiny.write_deepseek, SMALL_DEEPSEEK), (tiny.write_qwen, SMALL_QWEN)],
    ids=["deepseek", "qwen"],
)
def test_a_checkpoint_is_a_function_of_shape_and_seed(tmp_path, write, shape):
    first = digests(write(tmp_path / "a", shape, seed=3))
    assert digests(write(tmp_path / "b", shape, seed=3)) == first
    other = digests(write(tmp_path / "c", shape, seed=4))
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.startswith("model-")
    }


def test_index_names_every_tensor_and_its_file(tmp_path):
    folder = tiny.write_deepseek(tmp_path, SMALL_DEEPSEEK, max_shard_bytes=1 << 20)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
        assert path.stat().st_size <= (1 << 20) + 4096
    assert len(set(found.values())) > 2
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


def test_deepseek_has_the_published_tensors(tmp_path):
    found = tensors(tiny.write_deepseek(tmp_path, SMALL_DEEPSEEK))
    names = {name.removeprefix("model.layers.1.") for name in found if ".layers.1." in name}
    linear = {f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")}
    linear |= {"self_attn.kv_b_proj", "self_attn.o_proj"}
    for owner in ("shared_experts", *(f"experts.{e}" for e in range(8))):
        linear |= {f"mlp.{owner}.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    expected = {f"{name}.{kind}" for name in linear for kind in ("weight", "weight_scale_inv")}
    expected |= {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"}
    expected |= {"self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"}
    expected |= {"mlp.gate.e_score_correction_bias"}
    assert names == expected
    assert "model.layers.0.mlp.down_proj.weight_scale_inv" in found  # the dense first layer
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert found["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    # 320 rows of q/kv latent and rope are 2.5 blocks, as 576 are 4.5 in the published model.
    assert found["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (3, 2)


def test_an_mtp_layer_leaves_the_other_tensors_alone(tmp_path):
    shape = tiny.DeepseekShape(**{**SMALL_DEEPSEEK.__dict__, "num_nextn_predict_layers": 1})
    plain = tensors(tiny.write_deepseek(tmp_path / "a", SMALL_DEEPSEEK))
    mtp = tensors(tiny.write_deepseek(tmp_path / "b", shape))
    assert all(torch.equal(mtp[name].float(), plain[name].float()) for name in plain)
    extra = {name for name in mtp if name not in plain}
    assert extra and all(name.startswith("model.layers.2.") for name in extra)
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight"} <= extra


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_default_shapes_shard_into_whole_blocks(tp):
    d, q = tiny.DeepseekShape(), tiny.QwenShape()
    heads = d.num_attention_heads
    for width in (
        heads * (d.qk_nope_head_dim + d.qk_rope_head_dim),
        heads * (d.qk_nope_head_dim + d.v_head_dim),
        heads * d.v_head_dim,
        d.intermediate_size,
        d.moe_intermediate_size * d.n_shared_experts,
        d.moe_intermediate_size,
        q.moe_intermediate_size,
    ):
        assert width % (128 * tp) == 0


@pytest.mark.parametrize(("tp", "width"), [(8, 192), (8, 176), (4, 320), (2, 64)])
def test_unaligned_shapes_have_the_width_per_rank(tp, width):
    shape = tiny.DeepseekShape.unaligned(tp=tp, expert=width, dense=width)
    assert shape.moe_intermediate_size == shape.intermediate_size == tp * width
    assert shape.moe_intermediate_size % 128 == 0, "the whole tensor must have whole groups"
    assert tiny.QwenShape.unaligned(tp=tp, expert=width).moe_intermediate_size == tp * width
    assert width % 128


def test_fp8_blocks_hold_the_drawn_values():
    spec = TensorSpec("x.weight", (200, 320), 0.05, dtype=torch.float8_e4m3fn)
    stored, drawn = tiny_weights.store(spec, 0), tiny_weights.draw(spec, 0)
    weight, scale = stored["x.weight"], stored["x.weight_scale_inv"]
    assert weight.shape == (200, 320) and scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            rows, cols = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block, value = weight[rows, cols].float() * scale[i, j], drawn[rows, cols]
            # e4m3 keeps three mantissa bits (half a step is 2**-4) down to 2**-6, and steps of
            # 2**-9 below; the block's largest value maps to 448.
            limit = value.abs() * 2**-4 + scale[i, j] * 2**-10
            assert ((block - value).abs() <= limit * 1.001).all()
            assert weight[rows, cols].float().abs().max() == 448.0


def test_neighbouring_groups_have_clearly_different_scales():
    weight = tiny_weights.draw(TensorSpec("x.weight", (256, 1024), 0.02), 0)
    for group in (32, 64, 128):
        scale = weight.view(256, -1, group).abs().amax(-1)
        ratio = (scale[:, 1:] / scale[:, :-1]).log().abs()
        assert ratio.median() > 0.15, f"group {group}: a shifted scale would hardly show"
    assert abs(weight.std().item() - 0.02) < 1e-3


def test_tokenizer_round_trips_any_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, vocab_size=512, max_length=100)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital of Fränce is 巴黎 🙂, isn't it?\n\tdef f(): return 3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 512 and max(ids) < 512
    assert len(tokenizer("The experts of the layer")["input_ids"]) < 12, "no merges were learnt"
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB - 1, 5000])
def test_impossible_vocabularies_are_refused_with_the_limit(tmp_path, vocab_size):
    with pytest.raises(ConfigError, match=str(vocab_size)):
        write_tokenizer(tmp_path, vocab_size=vocab_size, max_length=100)


@pytest.mark.parametrize(
    ("write", "layers"), [(tiny.write_deepseek, 3), (tiny.write_qwen, 2)], ids=["deepseek", "qwen"]
)
def test_the_model_is_decided_and_every_expert_matters(tmp_path, write, layers):
    pytest.importorskip("transformers")
    from sglang_w4afp8.testing.hf_judge import HfJudge

    judge = HfJudge(write(tmp_path))
    prompts = [[300 + 7 * i + j for j in range(6)] for i in range(6)]
    continuations = [judge.greedy(prompt, 8) for prompt in prompts]
    gaps = sorted(gap for continuation in continuations for gap in continuation.gaps)
    assert gaps[len(gaps) // 2] > 0.5
    assert sum(gap < 0.01 for gap in gaps) <= 2
    assert len({tuple(c.token_ids) for c in continuations}) == len(prompts)
    assert all(math.isfinite(p) and p < 0 for c in continuations for p in c.logprobs)

    # One expert's output off by a tenth of a percent in one layer must move some log-probability
    # by far more than the 1e-4 that servers are held to.
    text = [token for prompt in prompts for token in prompt]
    before = torch.tensor(judge.forced(text))
    with torch.no_grad():
        judge.model.model.layers[layers - 1].mlp.experts.down_proj[3] *= 1.001
    after = torch.tensor(judge.forced(text))
    assert (after - before).abs().max() > 1e-4 * 3
