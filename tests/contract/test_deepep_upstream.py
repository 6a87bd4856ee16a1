"""What SGLang's own W4AFP8 method does behind DeepEP, read from the wheels: issue 33660."""

from __future__ import annotations

import ast
from pathlib import Path

from sglang_w4afp8.host_source import Definition, Resolver, WheelSource

_KERNEL = "deepep_post_reorder_triton_kernel"


def definition(wheel: Path, target: str) -> Definition:
    found = Resolver(WheelSource(wheel))(target)
    assert found is not None, f"{target} is gone; look again at what docs/kernels.md says of it"
    return found


def test_the_last_argument_of_the_sum_is_missing_in_one_release(tested_wheel: Path) -> None:
    """When 0.5.16 leaves the supported range, the sentence in docs/kernels.md goes with it."""
    caller = definition(
        tested_wheel, "sglang.srt.layers.moe.cutlass_w4a8_moe:cutlass_w4a8_moe_deepep_normal"
    )
    kernel = definition(tested_wheel, f"sglang.kernels.ops.moe.ep_moe_kernels:{_KERNEL}")
    assert isinstance(kernel.node, ast.FunctionDef)
    wanted = {argument.arg for argument in kernel.node.args.args}
    (call,) = (
        node
        for node in ast.walk(caller.node)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(f"{_KERNEL}[")
    )
    names = [argument.arg for argument in kernel.node.args.args]
    given = {*names[: len(call.args)], *(keyword.arg for keyword in call.keywords)}
    missing = {"routed_scaling_factor"} if "0.5.16" in tested_wheel.name else set()
    assert wanted - given == missing


def test_the_release_with_one_dtype_for_both_modes(tested_wheel: Path) -> None:
    """0.5.16 has no key per mode, so that its method got E4M3 where it expects BF16."""
    text = ast.unparse(
        definition(tested_wheel, "sglang.srt.layers.moe.utils:get_deepep_output_dtype").node
    )
    per_mode = "dispatch_mode.value" in text and "_dispatcher_output_dtype" in text
    assert per_mode is ("0.5.16" not in tested_wheel.name)
