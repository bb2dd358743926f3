"""AutoAWQ's GEMM layout: nibbles of eight output channels in a word (app/core/formats/awq.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.formats.awq import BITS
from app.core.formats.file_format import Scheme
from kernels.layouts import packed_words
from kernels.operators import pack, unpack
from kernels.weight import PackedWeight
from workers.formats.packings import Entry, Stored, group_size_of
from workers.modeling.quantized_weight import QuantizedWeight

SLICE_VALUES = 2 * 1024**2  # unpacked at a time; as int64 while they are packed


def pack_linear(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "qweight": pack(weight.q.T.contiguous(), BITS, interleaved=True),
        "qzeros": pack(weight.zero.T.contiguous(), BITS, interleaved=True),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
    }


def unpack_linear(stored: Stored, entry: Entry, scheme: Scheme | None = None) -> PackedWeight:
    """No linear is unpacked whole: it passes through in slices of its output channels."""
    words, scales = stored["qweight"], stored["scales"]
    in_features, out_features = words.shape[0], words.shape[1] * 8
    packed = torch.empty(
        out_features, packed_words(in_features, BITS), dtype=torch.int32, device=words.device
    )
    step = max(1, SLICE_VALUES // (8 * in_features))
    for first in range(0, words.shape[1], step):
        columns = words[:, first : first + step].contiguous()
        values = unpack(columns, BITS, 8 * columns.shape[1], interleaved=True)
        packed[8 * first : 8 * (first + step)] = pack(values.T.contiguous(), BITS)
    zero = unpack(stored["qzeros"].contiguous(), BITS, out_features, interleaved=True).T.contiguous()
    group_size = group_size_of(in_features, scales.shape[0])
    return PackedWeight(packed, scales.T.contiguous(), zero, BITS, group_size, in_features)
