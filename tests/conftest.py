"""What every test gets: a clean environment, the `gpu` marker from the folder, and a Valkey if it asks."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from redis import Redis

from app.core.redis.redis_server import connect
from tests.servers import valkey

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What the tests import stays: the garbage collector need not look through it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: they may differ by process (gzip holds the time), names may not."""
    return argname if isinstance(val, bytes) else None


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for leaks at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="no NVIDIA driver here: nvidia-smi is not on PATH")
    for item in items:
        if item.path.is_relative_to(TESTS / "gpu"):
            item.add_marker(pytest.mark.gpu)
            if shutil.which("nvidia-smi") is None:
                item.add_marker(absent)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers in every run and order: PyTorch's own seed differs each time."""
    torch = sys.modules.get("torch")  # not imported for tests that don't
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them, and nothing is kept in their home."""
    for name in list(os.environ):
        if name.startswith(("NIBBLE_", "AWS_", "HF_")) or name in ("COLUMNS", "LINES"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NIBBLE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def example_model(repository: Path) -> Path:
    """The bundled model."""
    return repository / "examples" / "wikitext-llama-6m"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Valkey process that this test process started."""
    with valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """An empty Valkey."""
    client: Redis = connect(redis_server)
    client.flushall()
    yield redis_server
    client.flushall()
    client.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    client = connect(redis_url)
    yield client
    client.close()
