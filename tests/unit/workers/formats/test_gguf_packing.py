"""Blocks of GGUF: bytes by the format's own rules, and values as gguf's own reader has them."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.file_format import Scheme
from app.core.formats.gguf import BLOCKS, block_of
from workers.formats.gguf_folder import interleaved, separated
from workers.formats.gguf_packing import pack_linear, unpack_linear
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.rounding import round_nearest

SCHEMES = [Scheme(bits=bits, group_size=32, symmetric=symmetric) for bits, symmetric in BLOCKS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounded(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    return round_nearest(weight, min_max_grid(grouped_view(weight, scheme), scheme, dtype), scheme)


@pytest.mark.parametrize(
    ("scheme", "zero", "expected"),
    [
        # d = 0.5; q 0..15 twice, so each byte holds an integer and itself
        (SCHEMES[0], 8, "0038" + "".join(f"{value * 17:02x}" for value in range(16))),
        # d = 0.5, m = -3 * 0.5
        (SCHEMES[1], 3, "0038" + "00be" + "".join(f"{value * 17:02x}" for value in range(16))),
        # d = 0.5; q - 128 as signed bytes
        (SCHEMES[2], 128, "0038" + "".join(f"{(value - 128) % 256:02x}" for value in [*range(16)] * 2)),
    ],
)
def test_a_block_has_the_bytes_of_the_format(scheme: Scheme, zero: int, expected: str) -> None:
    weight = QuantizedWeight(
        torch.arange(16, dtype=torch.uint8).repeat(2)[None],
        torch.tensor([[0.5]]),
        torch.tensor([[zero]], dtype=torch.uint8),
        scheme,
    )
    (blocks,) = pack_linear(weight, torch.float32)["blocks"]
    assert bytes(blocks.tolist()).hex() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: block_of(scheme).name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.integers(-12, 8))
def test_what_is_read_back_is_what_llama_cpp_computes_from(
    scheme: Scheme, dtype: torch.dtype, seed: int, rows: int, groups: int, size: int
) -> None:
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    computed = rounded(weight, scheme, dtype)
    blocks = pack_linear(computed, dtype)["blocks"]
    read = unpack_linear({"blocks": blocks}, {}, scheme)
    assert read.equals(computed)
    kind = gguf.GGMLQuantizationType[block_of(scheme).name]
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks.numpy(), kind)), read.dequantize())
    if scheme.symmetric:
        assert torch.equal(read.dequantize(), computed.dequantize())
    else:  # the smallest weight of a group is rounded to float16, of which 2^-11 of it is half a step
        error = (read.dequantize() - computed.dequantize()).abs().view(rows, groups, 32).amax(-1)
        largest = computed.scale * computed.zero
        assert bool((error <= largest * 2**-10 + 2**-24).all())


def test_a_changed_bit_is_seen() -> None:
    computed = rounded(torch.randn(3, 64), SCHEMES[1], torch.float16)
    blocks = pack_linear(computed, torch.float16)["blocks"]
    for byte in range(0, blocks.shape[1], 3):
        changed = blocks.clone()
        changed[1, byte] ^= 1
        assert not unpack_linear({"blocks": changed}, {}, SCHEMES[1]).equals(computed)


def test_a_minimum_beyond_float16_is_refused() -> None:
    weight = QuantizedWeight(
        torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[60000.0]]),
        torch.tensor([[15]], dtype=torch.uint8), SCHEMES[1],
    )  # fmt: skip
    with pytest.raises(ValueError, match="beyond float16"):
        pack_linear(weight, torch.float16)


def test_rows_go_back_to_their_places() -> None:
    rows = torch.arange(24).view(12, 2)
    there = interleaved(rows, 3)
    assert there[:4, 0].tolist() == [0, 4, 2, 6]  # rows 0, 2, 1, 3 of the first head of four
    assert torch.equal(separated(there, 3), rows)
