"""The gate's parts on sources small enough to see what should be found in them."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from sglang_w4afp8 import compat, host_source
from sglang_w4afp8.contract import Hook, Kind
from sglang_w4afp8.host_source import Resolver

MODULES = {
    "sglang": "",
    "sglang.names": """
        from typing import TYPE_CHECKING
        from sglang.real import *
        from sglang.real import Base as Renamed, early
        if TYPE_CHECKING:
            from sglang.real import OnlyForCheckers
        declared: int
        TABLE: dict = {"w4afp8": 1, "fp8": 2}
        try:
            import something_fast
        except ImportError:
            def fallback(a): ...
        def early(changed): ...
    """,
    "sglang.real": """
        class Base:
            member: int = 1
            def inherited(self, x, *, scale, bias=None): ...
            @staticmethod
            def free(layer): ...
            @classmethod
            def made(cls, config): ...
        class Derived(Base):
            def __init__(self):
                self.rank, self.size = 0, 1
                self.method = choose(self, prefix="p")
                self.late = 2
        class Output(NamedTuple):
            hidden: object
            scale: object = None
        def starred(**kwargs): ...
        class OnlyForCheckers: ...
        def early(first): ...
    """,
}


class DictSource:
    """Sources in memory."""

    label = "memory"

    def __init__(self, version: str | None = "0.5.16", **changed: str) -> None:
        self.version = version
        self.modules = {name: textwrap.dedent(text) for name, text in MODULES.items()}
        self.modules |= {f"sglang.{name}": textwrap.dedent(text) for name, text in changed.items()}

    def read(self, module: str) -> str | None:
        return self.modules.get(module)


@pytest.fixture
def resolve() -> Resolver:
    return Resolver(DictSource())


@pytest.mark.parametrize(
    ("target", "line_of"),
    [
        ("sglang.names:Renamed", "class Base"),
        ("sglang.names:starred", "def starred"),
        ("sglang.names:fallback", "def fallback"),
        ("sglang.names:Derived.inherited", "def inherited"),
        ("sglang.names:Derived.size", "self.rank, self.size"),
        ("sglang.names:Derived.member", "member: int"),
        ("sglang.names:early", "def early(changed)"),  # the last definition wins
    ],
)
def test_resolver_finds(resolve: Resolver, target: str, line_of: str) -> None:
    found = resolve(target)
    assert found is not None
    assert ast.unparse(found.node).startswith(line_of)


@pytest.mark.parametrize(
    "target",
    [
        "sglang.names:OnlyForChecker",
        "sglang.names:declared",
        "sglang.names:Derived.absent",
        "sglang.names:TABLE.key",
        "sglang.absent:anything",
    ],
)
def test_resolver_does_not_find(resolve: Resolver, target: str) -> None:
    assert resolve(target) is None


def test_names_for_type_checkers_only_do_not_count() -> None:
    source = DictSource(
        names="""
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from sglang.real import OnlyForCheckers
        """
    )
    assert Resolver(source)("sglang.names:OnlyForCheckers") is None


@pytest.mark.parametrize(
    ("kind", "target", "names", "problem"),
    [
        (Kind.OVERRIDE, "Base.inherited", ("x", "scale", "bias"), None),
        (Kind.OVERRIDE, "Base.inherited", ("x", "bias", "scale"), "takes (x, scale, bias)"),
        (Kind.OVERRIDE, "Base.made", ("config",), None),
        (Kind.OVERRIDE, "Base.free", ("layer",), None),
        (Kind.OVERRIDE, "Output", ("hidden", "scale"), None),
        (Kind.OVERRIDE, "Base.member", (), "is not a function"),
        (Kind.CALL, "Base.inherited", ("x", "scale"), None),
        (Kind.CALL, "Base.inherited", ("x",), "now also requires scale"),
        (Kind.CALL, "Base.inherited", ("x", "scale", "eps"), "does not take eps"),
        (Kind.CALL, "starred", ("anything",), None),
        (Kind.CALL, "Output", ("hidden",), None),
        (Kind.CALL, "Output", (), "now also requires hidden"),
        (Kind.ATTRIBUTE, "TABLE", ("w4afp8",), None),
        (Kind.ATTRIBUTE, "TABLE", ("w4a8",), "has no key w4a8"),
        (Kind.ATTRIBUTE, "Output", ("scale",), None),
        (Kind.ATTRIBUTE, "Output", ("topk",), "has no topk"),
        (Kind.ATTRIBUTE, "early", ("key",), "is not a dict literal"),
        (Kind.TEXT, "Base.inherited", ("bias=None",), None),
        (Kind.TEXT, "Base.inherited", ("bias=1",), "no longer contains 'bias=1'"),
        (Kind.ATTRIBUTE, "gone", (), "is missing"),
    ],
)
def test_checks(
    resolve: Resolver, kind: Kind, target: str, names: tuple[str, ...], problem: str | None
) -> None:
    hook = Hook(f"sglang.names:{target}", kind, names, "reason", "srt/module.py")
    found = compat.hook_problems(resolve, hooks=[hook])
    if problem is None:
        assert found == []
    else:
        (line,) = found
        assert problem in line
        assert line.endswith("(used by srt/module.py: reason)")


@pytest.mark.parametrize(
    ("callee", "names", "after", "problem"),
    [
        ("choose", ("prefix",), ("rank", "size"), None),
        ("choose", ("layer",), (), "without the keywords layer"),
        ("choose", (), ("late",), "does not set self.late before"),
        ("select", (), (), "does not call select() any more"),
    ],
)
def test_source_check(
    resolve: Resolver,
    callee: str,
    names: tuple[str, ...],
    after: tuple[str, ...],
    problem: str | None,
) -> None:
    hook = Hook("sglang.real:Derived.__init__", Kind.SOURCE, names, "w", "m", callee, after)
    found = compat.hook_problems(resolve, hooks=[hook])
    assert (problem is None) == (found == [])
    assert problem is None or problem in found[0]


def test_a_name_may_exist_in_another_form_or_be_optional(resolve: Resolver) -> None:
    gone = Hook("sglang.real:gone", Kind.ATTRIBUTE, (), "w", "m")
    other = Hook("sglang.real:gone", Kind.ATTRIBUTE, (), "w", "m", or_else="sglang.real:early")
    optional = Hook("sglang.real:gone", Kind.ATTRIBUTE, (), "w", "m", optional=True)
    assert len(compat.hook_problems(resolve, hooks=[gone, other, optional])) == 1


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23", "0.5.99", "0.5.24.dev3+g1a2b"])
def test_versions_inside(version: str) -> None:
    assert compat.version_problems(version) == []


@pytest.mark.parametrize("version", ["0.5.15.post1", "0.5.16rc1", "0.6.0", "0.6.0.dev1", "x", None])
def test_versions_outside(version: str | None) -> None:
    assert len(compat.version_problems(version)) == 1


def test_outside_the_range_the_version_is_all_that_is_said() -> None:
    report = compat.check_for_registration(DictSource("0.4.0"))
    assert not report.ok
    assert report.problems == ("version 0.4.0 lies outside the supported range >=0.5.16,<0.6",)


def test_many_differences_stay_one_screen() -> None:
    report = compat.check_for_registration(DictSource("0.5.16"))
    assert len(report.problems) > 20
    text = str(report.error())
    assert len(text.splitlines()) <= 20
    assert f"and {len(report.problems) - 8} more" in text


def test_an_untested_version_that_fits_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "hook_problems", lambda *args, **kwargs: [])
    untested = compat.check_for_registration(DictSource("0.5.19"))
    assert untested.ok
    assert "0.5.19 was not tested" in untested.warnings[0]
    assert compat.check_for_registration(DictSource("0.5.16")).warnings == ()


def test_no_sglang_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_source, "PACKAGE", "no_such_package_anywhere")
    report = compat.check_for_registration()
    assert not report.ok
    assert "not found" in str(report.error())


def test_installed_source_without_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "hosttree"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "_version.py").write_text("version = __version__ = '0.5.20.dev1'\n")
    (package / "sub" / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(host_source, "PACKAGE", "hosttree")
    source = host_source.InstalledSource()
    assert source.version == "0.5.20.dev1"
    assert source.read("hosttree.sub") == "x = 1\n"
    assert source.read("hosttree.other") is None
