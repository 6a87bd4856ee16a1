"""Rules of the house that no linter knows: sizes, docstrings, what a tracked file must not say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sglang_w4afp8 import __version__, compat

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
CODE = {".py", ".cu", ".cuh", ".sh"}
# Written so that this file does not match itself.
FORBIDDEN = {
    "the host of a package index": r"py[p]i\.(org|io)|pythonhos[t]ed|download\.pytorc[h]\.org",
    "an index or mirror setting": r"--(extra-)?inde[x]-url|find-lin[k]s\s*=|inde[x]-url\s*=",
    "a path of somebody's machine": r"(?<![\w.$}])/(wor[k]|roo[t]|home/[a-z]+|Users/[a-z]+)/\w",
}


def tracked() -> list[Path]:
    """Files under version control; in an unpacked archive, all but build products."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(part.startswith((".venv", ".git", "__pycache__")) for part in path.parts)
        ]
    return [path for path in paths if path.is_file()]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found.append((str(path.relative_to(ROOT)), data.decode("utf-8")))
    return found


def test_there_is_something_to_check() -> None:
    names = {name for name, _ in texts()}
    assert {"pyproject.toml", "sglang_w4afp8/plugin.py", "tests/unit/test_house.py"} <= names


@pytest.mark.parametrize("meaning", FORBIDDEN)
def test_no_tracked_file_contains(meaning: str) -> None:
    pattern = re.compile(FORBIDDEN[meaning])
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("meaning", "line"),
    [
        ("the host of a package index", "url = https://py" + "pi.org/simple"),
        ("an index or mirror setting", "--extra-in" + "dex-url https://x"),
        ("a path of somebody's machine", "cd /wo" + "rk/main"),
        ("a path of somebody's machine", "open('/ro" + "ot/x')"),
    ],
)
def test_the_patterns_find_what_they_mean(meaning: str, line: str) -> None:
    assert re.search(FORBIDDEN[meaning], line)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for name, text in texts():
        if name.endswith(".md"):
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
                if "://" not in target and not (ROOT / name).parent.joinpath(target).exists():
                    broken.append(f"{name}: {target}")
    assert broken == []


def test_no_file_is_too_long() -> None:
    long = {
        name: len(text.splitlines())
        for name, text in texts()
        if Path(name).suffix in CODE and len(text.splitlines()) > MAX_LINES
    }
    assert long == {}


def test_every_module_says_what_it_owns() -> None:
    silent = [name for name, tree in package_trees().items() if not ast.get_docstring(tree)]
    assert silent == []


def test_every_public_definition_of_the_package_has_a_docstring() -> None:
    """Methods that a Protocol of ours describes need not repeat it in every implementation."""
    trees = package_trees()
    described = {
        method.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
        for method in public_definitions(node)
        if ast.get_docstring(method)
    }
    assert {"supports", "prepare", "run"} <= described
    silent = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in trees.items()
        for node in public_definitions(tree)
        if not ast.get_docstring(node) and node.name not in described
    ]
    assert silent == []


def package_trees() -> dict[str, ast.Module]:
    return {
        name: ast.parse(text)
        for name, text in texts()
        if name.startswith("sglang_w4afp8/") and name.endswith(".py") and text.strip()
    }


def public_definitions(
    tree: ast.Module | ast.ClassDef,
) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node)
    return found


def test_annotations_are_lazy_everywhere() -> None:
    missing = [
        name
        for name, text in texts()
        if name.endswith(".py")
        and any(not isinstance(node, ast.Expr) for node in ast.parse(text).body)
        and "from __future__ import annotations" not in text
    ]
    assert missing == []


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert project["optional-dependencies"]["sglang"] == [f"sglang{compat.SUPPORTED_SGLANG}"]
    pinned = {path.name for path in (ROOT / "requirements").glob("sglang-*.txt")}
    assert pinned == {f"sglang-{version}.txt" for version in compat.TESTED}
    for version in compat.TESTED:
        text = (ROOT / "requirements" / f"sglang-{version}.txt").read_text()
        assert f"sglang=={version}" in text
        assert compat.version_problems(version) == []


def test_requirements_are_pinned_exactly() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w.\[\]-]+==[\w.+!-]+( ; .+)?", line), f"{path.name}: {line}"


@pytest.mark.parametrize(("reason", "code"), [("no such module", 1), ("needs a GPU", 0)])
def test_skips_that_hide_something_fail_in_ci(tmp_path: Path, reason: str, code: int) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    skip = f"import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"
    (tmp_path / "test_x.py").write_text(skip)
    (tmp_path / "test_z.py").write_text("def test_z(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "."],
        cwd=tmp_path,
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert ("for no accepted reason" in done.stdout) is bool(code)
