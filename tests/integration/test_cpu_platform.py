"""The CPU platform without a server: activation, defaults, FP8 arithmetic, the MLA repair."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang_w4afp8.errors import ShardError  # noqa: E402
from sglang_w4afp8.srt import cpu_fp8, cpu_platform  # noqa: E402
from sglang_w4afp8.testing import cpu_platform as entry  # noqa: E402

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("asked", [None, "", "cuda", "w4afp8", "w4afp8_cpu,other"])
def test_inactive_unless_asked_for_by_exactly_its_name(monkeypatch, asked):
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    if asked is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", asked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert entry.activate() is None
    assert entry.os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_sglang_resolves_the_platform_by_its_entry_point():
    code = (
        "import os; os.environ['SGLANG_PLATFORM'] = 'w4afp8_cpu'\n"
        "from sglang.srt.platforms import current_platform as p\n"
        "from sglang.srt.plugins import _get_excluded_dists\n"
        "print(type(p).__module__, p.is_out_of_tree(), p.is_cpu(), p.get_device(0), "
        "_get_excluded_dists(), os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last == "sglang_w4afp8.srt.cpu_platform True False cpu set() True"


def test_the_entry_point_module_imports_nothing_heavy():
    code = (
        "import sys, sglang_w4afp8.testing.cpu_platform as m; m.activate()\n"
        "print(sorted({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def server_args(**changes):
    args = dict(
        dp_size=1,
        tp_size=4,
        pp_size=1,
        attention_backend=None,
        disable_custom_all_reduce=False,
        max_total_tokens=None,
        max_running_requests=None,
    )
    return SimpleNamespace(**{**args, **changes})


@pytest.fixture
def clean_env(monkeypatch):
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)


@pytest.mark.parametrize("filled_in", [None, "intel_amx"])
def test_defaults_make_a_bare_launch_work(clean_env, filled_in):
    args = server_args(attention_backend=filled_in)
    cpu_platform.CpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "torch_native"
    assert args.disable_custom_all_reduce is True
    assert 1000 < args.max_total_tokens < 100_000
    assert 0 < args.max_running_requests < 100
    assert entry.os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0|0|0"
    assert entry.os.environ["OMP_NUM_THREADS"] == "1"


def test_what_the_user_said_stays(clean_env, monkeypatch):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0-3|4-7|8-11|12-15")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    args = server_args(
        attention_backend="flex_attention", max_total_tokens=77, max_running_requests=5
    )
    cpu_platform.CpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "flex_attention"
    assert (args.max_total_tokens, args.max_running_requests) == (77, 5)
    assert entry.os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0-3|4-7|8-11|12-15"
    assert entry.os.environ["OMP_NUM_THREADS"] == "4"


def test_block_dequantisation_by_hand():
    weight = torch.arange(1, 13, dtype=torch.float32).view(3, 4).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    value = cpu_fp8.dequantize_blocks(weight, scale, (2, 2), torch.float32)
    assert value.tolist() == [[1, 2, 30, 40], [5, 6, 70, 80], [900, 1000, 11000, 12000]]
    with pytest.raises(ShardError, match=r"grid of \(1, 2\).*3 x 4"):
        cpu_fp8.dequantize_blocks(weight, scale[:1], (2, 2), torch.float32)


def attention(heads=2, nope=4, value=2, rank=6, block=(4, 3)):
    """An MLA layer as SGLang leaves it off CUDA: absorbed weights squeezed into one FP8 scale."""
    torch.manual_seed(0)
    rows = heads * (nope + value)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(
        torch.randn(rows, rank).to(torch.float8_e4m3fn), requires_grad=False
    )
    layer.weight_scale_inv = torch.rand(-(-rows // block[0]), -(-rank // block[1])) + 0.1
    layer.quant_method = SimpleNamespace(weight_block_size=list(block))
    layer.params_dtype = torch.float32
    attn = torch.nn.Module()
    attn.kv_b_proj, attn.qk_nope_head_dim, attn.v_head_dim = layer, nope, value
    attn.w_kc = torch.zeros(heads, nope, rank).to(torch.float8_e4m3fn)
    attn.w_vc = torch.zeros(heads, rank, value).to(torch.float8_e4m3fn)
    attn.w_scale = 0.01
    return attn


def test_mla_repair_restores_the_exact_products():
    attn = attention()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), attn)
    full = cpu_fp8.dequantize_linear(attn.kv_b_proj, torch.float32)  # (2 * 6, 6)
    assert cpu_platform.repair_mla_weights(model) == 1
    for head in range(2):
        rows = full[6 * head : 6 * head + 6]
        assert torch.equal(attn.w_kc[head], rows[:4])
        assert torch.equal(attn.w_vc[head], rows[4:].T)
    assert attn.w_scale == 1.0 and attn.w_kc.stride(1) == 1


def test_mla_repair_takes_a_weight_that_its_method_has_dequantised():
    attn = attention()
    dense = torch.randn(12, 6)
    attn.kv_b_proj.weight = torch.nn.Parameter(dense, requires_grad=False)
    assert cpu_platform.repair_mla_weights(attn) == 1
    assert torch.equal(attn.w_kc[1], dense[6:10])


def test_mla_repair_leaves_unquantised_models_alone():
    attn = attention()
    attn.kv_b_proj.weight = torch.nn.Parameter(torch.randn(12, 6), requires_grad=False)
    attn.w_kc = torch.full((2, 4, 6), 7.0)
    assert cpu_platform.repair_mla_weights(attn) == 0
    assert (attn.w_kc == 7.0).all()


def test_fp8_experts_skip_other_ranks_and_sum_by_weight():
    torch.manual_seed(1)
    experts, hidden, inner, tokens = 3, 8, 4, 5
    layer = SimpleNamespace(
        w13_weight=torch.randn(experts, 2 * inner, hidden).to(torch.float8_e4m3fn),
        w13_weight_scale_inv=torch.rand(experts, 2, 2) + 0.5,
        w2_weight=torch.randn(experts, hidden, inner).to(torch.float8_e4m3fn),
        w2_weight_scale_inv=torch.rand(experts, 2, 1) + 0.5,
    )
    method = SimpleNamespace(weight_block_size=[4, 4])
    x = torch.randn(tokens, hidden)
    ids = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1], [0, 1]])
    weights = torch.rand(tokens, 2)
    out = cpu_fp8._experts(layer, x, ids, weights, method)
    for t in range(tokens):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for slot in range(2):
            e = int(ids[t, slot])
            if e < 0:
                continue
            w13 = layer.w13_weight[e].double()
            w13 *= layer.w13_weight_scale_inv[e].double().kron(torch.ones(4, 4))
            w2 = layer.w2_weight[e].double()
            w2 *= layer.w2_weight_scale_inv[e].double().kron(torch.ones(4, 4))
            gate, up = w13[:inner] @ x[t].double(), w13[inner:] @ x[t].double()
            expected += weights[t, slot] * (w2 @ (gate / (1 + (-gate).exp()) * up))
        assert torch.allclose(out[t].double(), expected, atol=1e-4, rtol=1e-5)
    assert (out[2] == 0).all()
