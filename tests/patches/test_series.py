"""The patch series against the released wheels: form, every prefix, their own tests, revert."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from sglang_w4afp8 import compat
from sglang_w4afp8.host_source import Resolver, WheelSource

HERE = Path(__file__).resolve().parent
PATCHES = HERE.parents[1] / "patches"
RELEASES = ("0.5.23", "0.5.10.post1")
# Which environment has what the patched tree needs; its tests run there.
ENVIRONMENT = {"0.5.23": "0.5.23", "0.5.10.post1": "0.5.16"}

Unpack = Callable[..., Path]
Digest = Callable[[Path], dict[str, str]]


class PatchedSource(WheelSource):
    """A wheel with the files of a patched tree laid over it, as the compatibility gate reads it."""

    def __init__(self, wheel: Path, root: Path) -> None:
        super().__init__(wheel)
        self._root = root / "python"

    def read(self, module: str) -> str | None:
        base = self._root / module.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        return super().read(module)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def files_of(release: str) -> list[Path]:
    return sorted((PATCHES / f"sglang-{release}").glob("*.patch"))


@pytest.mark.parametrize("release", RELEASES)
def test_series_lists_every_file_in_order(release: str) -> None:
    folder = PATCHES / f"sglang-{release}"
    listed = (folder / "series").read_text().split()
    assert listed == [path.name for path in files_of(release)]
    first = 0 if release == "0.5.23" else 1
    assert [int(name[:4]) for name in listed] == list(range(first, first + len(listed)))
    assert len(listed) == (8 if release == "0.5.23" else 4)


def test_every_patch_is_in_the_table() -> None:
    text = (PATCHES / "README.md").read_text()
    for release in RELEASES:
        for path in files_of(release):
            assert f"({path.parent.name}/{path.name})" in text


@pytest.mark.parametrize("path", [p for r in RELEASES for p in files_of(r)], ids=lambda p: p.stem)
def test_every_patch_can_be_reviewed(path: Path) -> None:
    """A header that says why, one concern, and tests with it."""
    text = path.read_text()
    header = text[: text.index("\n---\n")]
    assert re.match(r"From 0{40} Mon Sep 17 00:00:00 2001\nFrom: .*<.*@.*>", header, re.S)
    for heading in ("Problem: ", "Change: ", "Tests: ", "Upstream-Status: ", "GPU: "):
        assert header.count(f"\n{heading}") == 1, heading
    assert f"\nBase: {path.parent.name.replace('-', ' ', 1)}\n" in header + "\n"
    assert len(text.splitlines()) < 400
    touched = re.findall(r"^\+\+\+ b/(\S+)$", text, re.M)
    assert all(name.startswith(("python/sglang/", "test/", "docs_new/")) for name in touched)
    for name in re.findall(r"test/registered/\S+?\.py", header):
        assert name in touched, name
    assert any("/test_" in name for name in touched) or path.name.startswith("0007-Docs")


@pytest.mark.parametrize("release", RELEASES)
def test_every_prefix_applies_compiles_and_suits_the_plugin(
    apply: ModuleType, unpack: Unpack, base_wheel: Callable[[str], Path], release: str
) -> None:
    touched = re.findall(
        r"^\+\+\+ b/python/(\S+)$", "\n".join(p.read_text() for p in files_of(release)), re.M
    )
    root = unpack(release, {*touched, "sglang/srt/__init__.py"})
    resolve = Resolver(PatchedSource(base_wheel(release), root))
    target = apply.Target.find(root)
    series = apply.choose(target, None)
    assert series.name == f"sglang-{release}", "recognised by content: a checkout has no version"
    original = {p: apply._read(p) for p, _, _ in apply.plan(target, series, len(series.patches))}
    for count in range(1, len(series.patches) + 1):
        changes = apply.plan(target, series, count)
        apply.apply(target, series, count)
        for path, _, text in changes:
            assert path.read_text() == text
            if path.suffix == ".py":
                compile(text, str(path), "exec")
        if release in compat.TESTED:
            for name in touched:  # parsing all others again each time takes longest
                resolve._trees.pop(module_of(name), None)
            assert compat.hook_problems(resolve, thorough=True) == [], f"after patch {count}"
        apply.revert(target)
        assert {path: apply._read(path) for path in original} == original
    assert list(root.iterdir()) == [root / "python"], "folders that the patches had made"


@pytest.mark.parametrize("release", RELEASES)
def test_patched_tree_passes_its_own_tests_and_carries_the_plugin(
    apply: ModuleType, unpack: Unpack, digest: Digest, release: str
) -> None:
    """In one process, because importing SGLang takes longer than the tests."""
    if find_spec("sglang") is None or version("sglang") != ENVIRONMENT[release]:
        pytest.skip(f"runs in the environment of SGLang {ENVIRONMENT[release]}")
    root = unpack(release)
    before = digest(root)
    assert apply.main(["apply", str(root)]) == 0
    if release in compat.TESTED:
        options = [str(HERE / "on_patched_tree.py")]
        paths = [root / "python"]
    else:
        options = ["-p", "mock_sgl_kernel"]
        paths = [root / "python", HERE]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("--import-mode=importlib", "-o", "addopts=", "-W", "ignore", "--rootdir", str(root)),
            *("-c", os.devnull, str(root / "test"), *options),
        ],
        cwd=root,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATCHED_TREE": str(root),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= (45 if release == "0.5.23" else 25), done.stdout[-500:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    assert apply.main(["revert", str(root)]) == 0
    assert digest(root) == before
