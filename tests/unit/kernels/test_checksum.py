"""The checksum of written bytes: it sees every small change, wherever it is."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from kernels import fallbacks
from kernels.cpu import checksum as module
from kernels.cpu.checksum import checksum


@pytest.fixture(params=["compiled", "without a compiler"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "compiled":
        monkeypatch.setattr(module, "library", lambda: None)
    elif module.library() is None:
        pytest.skip(str(fallbacks.noted()))
    return str(request.param)


def content(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)).to(torch.uint8)


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 5000])
def test_every_changed_byte_is_seen(form: str, size: int) -> None:
    values = content(size)
    before = checksum(values)
    assert checksum(values.clone()) == before, form
    for at in range(size):
        changed = values.clone()
        changed[at] ^= 1 << at % 8
        assert checksum(changed) != before, at


def test_order_and_length_count(form: str) -> None:
    values = content(4096)
    longer = torch.cat([values, torch.zeros(1, dtype=torch.uint8)])
    others = (values.flip(0), values.roll(256), values.roll(4), longer)
    assert len({checksum(each) for each in (values, *others)}) == 5, form


def test_nothing_has_a_checksum_too(form: str) -> None:
    assert checksum(content(0)) == checksum(torch.empty(0, dtype=torch.uint8)), form


def test_without_a_compiler_it_is_crc_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", lambda: None)
    assert checksum(content(100)) == zlib.crc32(bytes(content(100).tolist()))
