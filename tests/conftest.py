"""Tests marked ``gpu`` are skipped where there is none, and the last lines say so."""

from __future__ import annotations

import pytest

_skipped = pytest.StashKey[int]()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or _has_gpu():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    config.stash[_skipped] = len(gpu_items)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    count = config.stash.get(_skipped, 0)
    if count:
        terminalreporter.section("GPU tests NOT RUN", yellow=True, bold=True)
        terminalreporter.write_line(f"{count} tests need a CUDA device and this machine has none.")
