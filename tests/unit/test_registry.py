"""Choosing a backend: order, reasons, and no fallback for a named one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.registry import BACKENDS, explain, get_backend, select
from sglang_w4afp8.layer import Device, MoEProblem
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

HOPPER = Device("cuda", (9, 0), "NVIDIA H100")
ADA = Device("cuda", (8, 9), "NVIDIA L40S")
PROBLEM = MoEProblem(
    num_experts=256,
    hidden_size=7168,
    columns=AxisShard.even(2048, 128, 1, 32),
    group_size=128,
    top_k=8,
    scheme=ActivationScheme.STATIC,
    device=HOPPER,
)


def test_every_backend_answers_every_question() -> None:
    for device in (HOPPER, ADA, Device("cpu")):
        for scheme in ActivationScheme:
            verdicts = explain(replace(PROBLEM, device=device, scheme=scheme))
            assert [v.backend for v in verdicts] == list(BACKENDS)
            assert verdicts[-1].reason is None, "the torch backend runs everything"


def test_named_backends_are_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(PROBLEM, "torch").name == "torch"
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "torch")
    assert select(PROBLEM).name == "torch"
    with pytest.raises(BackendError) as caught:
        select(replace(PROBLEM, device=ADA), "cutlass")
    assert "L40S" in str(caught.value)
    assert "SGLANG_W4AFP8_MOE_BACKEND=torch" in str(caught.value)
    with pytest.raises(BackendError, match="known backends"):
        select(PROBLEM, "marlin")


@pytest.mark.parametrize(
    ("change", "part_of_reason"),
    [
        ({"device": ADA}, "9.0"),
        ({"group_size": 32}, "128"),
        ({"scheme": ActivationScheme.DYNAMIC_PER_TOKEN}, "dynamic_per_token"),
        ({"scheme": ActivationScheme.NONE}, "none"),
        ({"dtype": torch.float32}, "bfloat16"),
        ({"hidden_size": 7100}, "7100"),
        ({"apply_router_weight_on_input": True}, "router weights"),
    ],
)
def test_cutlass_says_why_not(change: dict[str, object], part_of_reason: str) -> None:
    cutlass = get_backend("cutlass")
    assert cutlass.supports(PROBLEM) is None
    reason = cutlass.supports(replace(PROBLEM, **change))  # type: ignore[arg-type]
    assert reason is not None and part_of_reason in reason


def test_nothing_fits() -> None:
    with pytest.raises(BackendError, match="gelu"):
        select(replace(PROBLEM, activation="gelu"), "auto")
