"""The installed version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("nibble")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
