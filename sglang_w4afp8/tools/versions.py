"""Versions of installed distributions, for reports and comparisons. Standard library only."""

from __future__ import annotations

from importlib import metadata


def version_of(distribution: str) -> str:
    """An installed distribution's version, or ``not installed``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
