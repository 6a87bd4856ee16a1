"""The bench's peers against SGLang's real functions: every call binds, every shape is as wanted.

The kernels themselves need a GPU; here each is replaced by a stand-in that first binds what it is
given to the real signature.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.peers.marlin import repack_module
from sglang_w4afp8.tools.bench_peers import PROVIDERS, providers

ROOT = Path(__file__).parents[2]
EXPERTS, HIDDEN, TOP_K, TOKENS = 4, 256, 2, 3
H100 = Device("cuda", (9, 0), "NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def _looks_like_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang")
    # Humming starts compilers in the background when imported.
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    # It lasts as long as the process, which other tests share.
    for module in ("cutlass", "fp8", "humming", "marlin"):
        monkeypatch.setattr(f"sglang_w4afp8.srt.peers.{module}.enter_single_rank", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H100.name)


def problem(inner: int) -> MoEProblem:
    columns = AxisShard.even(inner * 2, 128, 0, 2)
    return MoEProblem(EXPERTS, HIDDEN, columns, 128, TOP_K, ActivationScheme.STATIC, H100)


def weights(inner: int) -> MoEWeights:
    g = torch.Generator().manual_seed(inner)

    def codes(rows: int, k: int) -> torch.Tensor:
        return pack_int4(torch.randint(-7, 8, (EXPERTS, rows, k), generator=g))

    group = min(inner, 128)
    one = torch.ones(1)
    return MoEWeights(
        codes(2 * inner, HIDDEN),
        torch.rand(EXPERTS, 2 * inner, HIDDEN // 128, generator=g).bfloat16() + 0.5,
        codes(HIDDEN, inner),
        torch.rand(EXPERTS, HIDDEN, inner // group, generator=g).bfloat16() + 0.5,
        128,
        group,
        one,
        one,
    )


def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]], dtype=torch.int32)
    return torch.randn(TOKENS, HIDDEN).bfloat16(), torch.rand(TOKENS, TOP_K), ids


Bound = dict[str, Any]


def replace(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, answer: Callable[[Bound], Any]
) -> list[Bound]:
    """Put a stand-in for ``module.name`` in its place; returns the list of its bound calls."""
    target = importlib.import_module(module)
    real = getattr(target, name)
    if isinstance(real, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        arguments = getattr(real, "default", real)._schema.arguments
        signature = inspect.Signature(
            [
                inspect.Parameter(
                    argument.name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=argument.default_value
                    if argument.has_default_value()
                    else inspect.Parameter.empty,
                )
                for argument in arguments
            ]
        )
    else:
        signature = inspect.signature(real)
    seen: list[Bound] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        seen.append(dict(signature.bind(*args, **kwargs).arguments))
        return answer(seen[-1])

    monkeypatch.setattr(target, name, stand_in)
    return seen


def prepared(name: str, inner: int) -> Any:
    provider = providers([name])[0]
    assert provider.why_not(problem(inner)) is None
    return provider.prepare(problem(inner), weights(inner), EXPERTS, 64)


def test_all_providers_load_in_order() -> None:
    assert [provider.name for provider in providers()] == list(PROVIDERS)
    assert [p.name for p in providers(["deepgemm-fp8", "ours"])] == ["ours", "deepgemm-fp8"]


def test_documented_tolerances_are_the_ones_in_use() -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    table = text[text.index("| peer | activations | allowed") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    documented = {
        name.strip("` "): float(allowed) for names, _, allowed in rows for name in names.split(",")
    }
    assert documented == {provider.name: provider.tolerance for provider in providers()}


def test_marlins_tolerance_is_about_what_it_was_measured_to_need() -> None:
    files = sorted((ROOT / "benchmarks/results").glob("moe-*.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    found = [row["error"] for row in rows if row["provider"] == "marlin-w4a16" and "error" in row]
    (marlin,) = providers(["marlin-w4a16"])
    assert len(found) > 20 and max(found) < marlin.tolerance < 2 * max(found)


def test_marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    def repacked(seen: Bound) -> torch.Tensor:
        words, k, rows = seen["b_q_weight"], seen["size_k"], seen["size_n"]
        assert words.shape == (k // 8, rows) and words.dtype == torch.int32
        return words.new_empty(k // 16, rows * 2)

    replace(monkeypatch, repack_module().__name__, "gptq_marlin_repack", repacked)
    marlin = "sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe"
    seen = replace(monkeypatch, marlin, "fused_marlin_moe", lambda bound: bound["hidden_states"])
    utils = "sglang.srt.layers.quantization.marlin_utils"
    replace(monkeypatch, utils, "marlin_make_workspace", lambda _: torch.zeros(528))
    for inner in (256, 64):
        x, route, ids = call()
        assert prepared("marlin-w4a16", inner)(x, route, ids) is x
        given = seen[-1]
        assert given["w1"].shape == (EXPERTS, HIDDEN // 16, 4 * inner)
        assert given["w2"].shape == (EXPERTS, inner // 16, 2 * HIDDEN)
        assert given["w1_scale"].shape == (EXPERTS, HIDDEN // 128, 2 * inner)
        assert given["w2_scale"].shape == (EXPERTS, max(inner // 128, 1), HIDDEN)
        assert given["w1_scale"].dtype == torch.bfloat16 and given["num_bits"] == 4


def test_fp8_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"
    seen = replace(monkeypatch, module, "fused_experts", lambda bound: bound["hidden_states"])
    for inner, block in ((256, 128), (64, 64)):
        prepared("sglang-fp8-triton", inner)(*call())
        given = seen[-1]
        assert given["w1"].dtype == given["w2"].dtype == torch.float8_e4m3fn
        assert given["w1_scale"].shape == (EXPERTS, 2 * inner // block, HIDDEN // block)
        assert given["w2_scale"].shape == (EXPERTS, HIDDEN // block, inner // block)
        assert given["block_shape"] == [block, block] and not given["moe_runner_config"].inplace


def test_deepgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "sglang.srt.layers.moe.moe_runner.deep_gemm"
    x, route, ids = call()
    kept = x.clone()

    def pre(bound: Bound) -> Any:
        dispatched = bound["dispatch_output"]
        assert torch.equal(dispatched.topk_output.topk_ids, ids)
        dispatched.hidden_states.set_(torch.empty(0, dtype=torch.bfloat16))
        return "input"

    def post(bound: Bound) -> Any:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

        assert bound["runner_output"] == "output"
        return StandardCombineInput(kept)

    replace(monkeypatch, module, "pre_permute_standard_to_deep_gemm", pre)
    replace(monkeypatch, module, "post_permute_deep_gemm_to_standard", post)
    core = importlib.import_module(module).DeepGemmRunnerCore
    monkeypatch.setattr(core, "run", lambda self, given, info, state: "output")
    run = prepared("deepgemm-fp8", 128)
    for _ in range(2):
        assert torch.equal(run(x, route, ids), kept)
        assert torch.equal(x, kept), "the bench's own input must survive"
    assert "no whole blocks" in str(providers(["deepgemm-fp8"])[0].why_not(problem(64)))


def test_cutlass_refuses_half_groups() -> None:
    provider = providers(["sglang-cutlass"])[0]
    # Its compiled operators are missing on a machine without CUDA: a reason, not an exception.
    assert "sgl_kernel" in (provider.why_not(problem(128)) or "sgl_kernel")
    assert "no whole groups" in str(provider.why_not(problem(64)))


@pytest.mark.parametrize("inner", [256, 64])
@pytest.mark.parametrize("name", ["humming-w4a8", "humming-w4a16"])
def test_humming(name: str, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from humming.layer import HummingMethod

    monkeypatch.setattr(HummingMethod, "transform_humming_layer", lambda *_, **__: None)
    module = importlib.import_module("sglang.srt.layers.moe.moe_runner.humming")
    replaced = replace(
        monkeypatch,
        module.__name__,
        "humming_moe_runner_core_run",
        lambda b: b["hidden_states"],
    )
    x, route, ids = call()
    assert prepared(name, inner)(x, route, ids) is x
    assert replaced[0]["gemm_type"] == "indexed"
    core = module.HummingRunnerCore.runner_cores.get(replaced[0]["moe_runner_id"])
    assert core is None or core.layer.humming_metas["w13"].num_experts == EXPERTS

    provider: Any = providers([name])[0]
    layer = provider.layer(problem(inner), weights(inner), transform=False)
    for projection, rows, k in (("w13", 2 * inner, HIDDEN), ("w2", HIDDEN, inner)):
        meta = layer.humming_metas[projection]
        tensors = {
            "weight": getattr(layer, f"{projection}_weight").data,
            "weight_scale": getattr(layer, f"{projection}_weight_scale").data,
        }
        padded = HummingMethod.check_and_pad_tensors(
            tensors=tensors, meta=meta
        )  # raises on a wrong shape
        assert padded["weight"].shape[1:] == (-(-rows // 256) * 256, -(-k // 128) * 16)
