"""The hook table against released SGLang wheels, read as source: no import, no GPU, seconds.

Half of this file alters the source and expects the gate to notice, because a gate that cannot fail
is worth nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import sglang_w4afp8
from sglang_w4afp8 import compat
from sglang_w4afp8.contract import Hook, Kind
from sglang_w4afp8.hooks import HOOKS
from sglang_w4afp8.host_source import Function, Resolver, WheelSource

SRT = Path(sglang_w4afp8.__file__).parent / "srt"
# They serve tests and demonstrations, which fail by themselves; see hooks.py.
NOT_IN_THE_TABLE = ("cpu_fp8", "cpu_platform", "shard_check", "virtual_deepep", "virtual_ranks")


class AlteredSource:
    """A wheel whose every module passes through ``alter`` before it is read."""

    def __init__(self, wheel: WheelSource, alter: Callable[[str, str], str]) -> None:
        self.label = f"altered {wheel.label}"
        self.version = wheel.version
        self._wheel = wheel
        self._alter = alter

    def read(self, module: str) -> str | None:
        source = self._wheel.read(module)
        return None if source is None else self._alter(module, source)


def problems_after(
    wheel: Path, alter: Callable[[str, str], str], hooks: Sequence[Hook] = HOOKS
) -> list[str]:
    source = AlteredSource(WheelSource(wheel), alter)
    return compat.hook_problems(Resolver(source), hooks=hooks)


def test_every_hook_fits(tested_wheel: Path) -> None:
    report = compat.check_for_registration(WheelSource(tested_wheel), thorough=True)
    assert report.problems == ()
    assert report.warnings == ()
    assert report.version in compat.TESTED


def test_renaming_any_name_is_noticed(tested_wheel: Path) -> None:
    for hook in HOOKS:
        names = [path.rpartition(":")[2] for path in (hook.target, hook.or_else) if path]
        # A constructor has its class's name.
        names = [name.removesuffix(".__init__").rpartition(".")[2] for name in names]
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        found = problems_after(
            tested_wheel, lambda _, source, p=pattern: p.sub("renamed_upstream", source), [hook]
        )
        assert len(found) == (0 if hook.optional else 1), hook.target


def test_a_call_that_goes_elsewhere_is_noticed(tested_wheel: Path) -> None:
    for hook in HOOKS:
        if hook.kind is not Kind.SOURCE:
            continue
        call = f"{hook.callee}("
        found = problems_after(
            tested_wheel, lambda _, source, c=call: source.replace(c, "somewhere.else_("), [hook]
        )
        assert len(found) == 1, hook.target


def add_parameter(source: str, name: str) -> str:
    """Give every function called ``name`` one more parameter that must be passed."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.name == name:
            node.args.kwonlyargs.append(ast.arg("brand_new"))
            node.args.kw_defaults.append(None)
    return ast.unparse(tree)


def test_a_new_parameter_is_noticed(tested_wheel: Path) -> None:
    for hook in HOOKS:
        path = hook.target.rpartition(":")[2]
        if hook.kind not in (Kind.OVERRIDE, Kind.CALL):
            continue
        definition = Resolver(WheelSource(tested_wheel))(hook.target)
        if definition is None and hook.optional:
            continue
        assert definition is not None
        is_class = isinstance(definition.node, ast.ClassDef)
        name = "__init__" if is_class else path.rpartition(".")[2]
        if is_class and f"def {name}" not in ast.unparse(definition.node):
            continue  # a NamedTuple; its fields are compared by the next test
        module = definition.module

        def alter(read: str, source: str, module: str = module, name: str = name) -> str:
            return add_parameter(source, name) if read == module else source

        assert len(problems_after(tested_wheel, alter, [hook])) == 1, hook.target


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # Our slicing would be bypassed silently: the case the SOURCE rows are there for.
        ("self._weight_loader_impl(\n", "FusedMoE._weight_loader_impl(self, \n", "weight_loader "),
        ("shard_id=shard_id", "shard=shard_id", "without the keywords shard_id"),
        ("moe_intermediate_size=intermediate_size", "full=1", "moe_intermediate_size"),
        ("self.moe_tp_rank =", "self.moe_tp_rank_later =", "does not set self.moe_tp_rank"),
        ('"w4afp8": W4AFp8Config', '"w4a8": W4AFp8Config', "has no key w4afp8"),
        (
            "        if (\n            not _is_cuda",
            "        if (\n            not _is_any_gpu",
            "not _is_cuda",
        ),
        ("class W4AFp8MoEMethod(", "class W4AFp8ExpertMethod(", "W4AFp8MoEMethod is missing"),
        ("dispatch_output: StandardDispatchOutput", "dispatched: object", "expected (layer, disp"),
    ],
)
def test_a_refactor_is_noticed(tested_wheel: Path, old: str, new: str, expected: str) -> None:
    changed: list[str] = []

    def alter(module: str, source: str) -> str:
        if old in source:
            changed.append(module)
        return source.replace(old, new)

    found = problems_after(tested_wheel, alter)
    assert changed, f"the wheel no longer contains {old!r}; write another alteration"
    assert any(expected in line for line in found), found


def upstream_imports() -> set[tuple[str, str]]:
    """``(module, name)`` of every run-time import of SGLang in ``srt/``."""
    found: set[tuple[str, str]] = set()
    for path in sorted(SRT.glob("*.py")):
        if path.stem in NOT_IN_THE_TABLE:
            continue
        for node in ast.walk(without_type_checking(ast.parse(path.read_text()))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                found |= {(node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("sglang.") for alias in node.names), path
    return found


def without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return tree


def test_every_import_of_sglang_has_a_row() -> None:
    imports = upstream_imports()
    assert len(imports) > 15
    targets = [hook.target for hook in HOOKS] + [hook.or_else for hook in HOOKS]
    missing = [
        f"{module}:{name}"
        for module, name in sorted(imports)
        # A name of that module, or a module of that package.
        if not any(re.match(rf"{module}(:{name}(\.|$)|\.{name}:)", target) for target in targets)
    ]
    assert missing == [], "add rows to sglang_w4afp8/hooks.py"


def test_every_row_names_a_module_of_ours_that_uses_it() -> None:
    for hook in HOOKS:
        if hook.used_by == "plugin.py" or hook.kind in (Kind.SOURCE, Kind.TEXT):
            continue  # what calls us or goes on around us, not what we call
        text = (SRT.parent / hook.used_by).read_text()
        names = [hook.target.rpartition(":")[2].removesuffix(".__init__").rpartition(".")[2]]
        assert any(name in text for name in (*names, *hook.names)), hook


def test_a_module_python_cannot_parse_is_a_problem_not_a_crash(tested_wheel: Path) -> None:
    found = problems_after(tested_wheel, lambda _, source: f"match = = 1\n{source}")
    assert len(found) == len(HOOKS)
    assert all("cannot be read" in line for line in found)


def test_command_line(
    tested_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compat.main([str(tested_wheel)]) == 0
    assert "hooks as expected" in capsys.readouterr().out
    renamed = tmp_path / tested_wheel.name.replace("sglang-0.5.", "sglang-0.4.")
    renamed.symlink_to(tested_wheel)
    assert compat.main([str(renamed)]) == 1
    assert "lies outside the supported range" in capsys.readouterr().out
