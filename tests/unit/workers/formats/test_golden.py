"""The bytes of the formats, frozen: what was published must stay readable."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.core.formats.file_format import Scheme
from tests.golden.make_packed import FROZEN, golden_weight, packed
from workers.formats import awq_packing as awq
from workers.formats import compressed_tensors_packing as compressed_tensors
from workers.formats import gptq_packing as gptq

CASES = {
    "awq w4 g32": (awq, Scheme(bits=4, group_size=32, symmetric=False)),
    "compressed-tensors w4 g32": (compressed_tensors, Scheme(bits=4, group_size=32, symmetric=False)),
    "compressed-tensors w3 g32 sym": (compressed_tensors, Scheme(bits=3, group_size=32, symmetric=True)),
    "compressed-tensors w2 g32": (compressed_tensors, Scheme(bits=2, group_size=32, symmetric=False)),
    "compressed-tensors w8 channel": (compressed_tensors, Scheme(bits=8, group_size=-1, symmetric=False)),
}
CASES |= {
    f"gptq w{bits} g32 sym": (gptq, Scheme(bits=bits, group_size=32, symmetric=True)) for bits in (2, 3, 4, 8)
}


def frozen_tensors(case: str) -> dict[str, Tensor]:
    entries = json.loads(FROZEN.read_text("utf-8"))[case]
    return {
        name: torch.frombuffer(bytearray.fromhex(entry["hex"]), dtype=getattr(torch, entry["dtype"])).view(
            entry["shape"]
        )
        for name, entry in entries.items()
    }


def test_what_is_written_has_not_changed() -> None:
    assert packed() == json.loads(FROZEN.read_text("utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_the_frozen_bytes_are_read(case: str) -> None:
    layout, scheme = CASES[case]
    expected = golden_weight(scheme, 32 if layout is gptq else 8)
    assert layout.unpack_linear(frozen_tensors(case), {}, scheme).equals(expected.packed())


class Dispatched(TorchDispatchMode):
    """The operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names += [str(func)] if func.namespace == "nibble" else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_packing_goes_through_the_operators(case: str) -> None:
    """They hand tensors on a GPU to its kernels: packing there costs no time of the processor."""
    layout, scheme = CASES[case]
    packed_tensors = 1 if layout is compressed_tensors and scheme.symmetric else 2
    weight = golden_weight(scheme, 32 if layout is gptq else 8)
    with Dispatched() as dispatched:
        stored = layout.pack_linear(weight, torch.float16)
    assert dispatched.names == ["nibble.pack.default"] * packed_tensors
    with Dispatched() as dispatched:
        layout.unpack_linear(stored, {}, scheme)
    # Rows of words are taken as they are; AWQ's lie across them and are packed anew.
    expected = ["nibble.unpack.default"] * (packed_tensors - 1)
    if layout is awq:
        expected = ["nibble.unpack.default", "nibble.pack.default", *expected]
    assert dispatched.names == expected


def test_words_worked_out_by_hand() -> None:
    """Row 0 of the 4-bit weight starts 0 7 14 5 12 3 10 1: dense, first value in the lowest bits."""
    four = golden_weight(Scheme(bits=4, group_size=32, symmetric=False))
    assert four.q[0, :8].tolist() == [0, 7, 14, 5, 12, 3, 10, 1]
    assert int(frozen_tensors("compressed-tensors w4 g32")["weight_packed"][0, 0]) == 0x1A3C5E70
    first = four.q[:, 0].tolist()  # the eight channels of AWQ's first word
    word = sum(first[channel] << (4 * place) for place, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    assert int(frozen_tensors("awq w4 g32")["qweight"][0, 0]) & 0xFFFFFFFF == word
    assert int(frozen_tensors("gptq w4 g32 sym")["qweight"][0, 0]) == 0x1A3C5E70
    assert int(frozen_tensors("gptq w4 g32 sym")["qzeros"][0, 0]) == 0x77777777
