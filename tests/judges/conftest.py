"""Environments of judges: JUDGES names their folder, and each must be there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.conftest import service

__all__ = ["service"]

FOLDER = Path(os.environ.get("JUDGES", ".judges")).absolute()


def judge(name: str) -> Path:
    """The folder of an environment."""
    folder = FOLDER / name
    assert (folder / "installed").exists(), f"no {folder}: make it by `make judges`"
    return folder


@pytest.fixture(scope="session")
def vllm_environment() -> Path:
    return judge("vllm")


@pytest.fixture(scope="session")
def llama_cpp_environment() -> Path:
    return judge("llama_cpp")
