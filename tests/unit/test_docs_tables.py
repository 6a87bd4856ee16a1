"""The generated tables in ``docs/`` say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from sglang_w4afp8 import compat, env

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts/docs_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(script: ModuleType) -> None:
    assert {"variables", "hooks"} <= set(script.TABLES)
    for name, (file, make) in script.TABLES.items():
        text = (ROOT / "docs" / file).read_text()
        current = script.with_table(text, name, make()) == text
        assert current, f"{file}: {name}: run python scripts/docs_tables.py"


def test_an_outdated_table_is_noticed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    new = env.Variable("SGLANG_W4AFP8_NEW", "0", ("0", "1"), "Is new.")
    monkeypatch.setattr(env, "VARIABLES", (*env.VARIABLES, new))
    text = (ROOT / "docs/configuration.md").read_text()
    assert script.with_table(text, "variables", script.variables_table()) != text


def test_missing_markers_are_an_error(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 places"):
        script.with_table("no markers here", "variables", "|")


def test_the_page_names_the_range_and_the_tested_versions() -> None:
    text = (ROOT / "docs/compatibility.md").read_text()
    assert f"`sglang{compat.SUPPORTED_SGLANG}`" in text
    assert f"{' and '.join(compat.TESTED)}: contract" in text
