"""The GPTQ layout: a column's words are a row of the packed weight (app/core/formats/gptq.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.checks import BITS
from kernels.layouts import from_stored_zeros, packed_words, to_stored_zeros
from kernels.operators import pack, unpack
from kernels.weight import PackedWeight
from workers.formats.packings import Entry, Stored, group_size_of
from workers.modeling.quantized_weight import QuantizedWeight


def pack_linear(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    bits, in_features, groups = weight.scheme.bits, weight.shape[1], weight.scale.shape[1]
    return {
        "qweight": pack(weight.q, bits).T.contiguous(),
        "qzeros": pack(to_stored_zeros(weight.zero.T.contiguous()), bits),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
        "g_idx": group_of_channels(in_features, groups, weight.q.device),
    }


def unpack_linear(stored: Stored, entry: Entry, scheme: Scheme | None = None) -> PackedWeight:
    """The first version stores zero points less one, `gptq_v2` as they are."""
    words, scales, channels = stored["qweight"], stored["scales"], stored["g_idx"]
    in_features, (groups, out_features) = channels.shape[0], scales.shape
    bits = words.shape[0] * 32 // in_features
    if bits not in BITS or packed_words(in_features, bits) != words.shape[0]:
        raise ValueError(f"qweight {tuple(words.shape)} does not hold in_features={in_features}")
    group_size = group_size_of(in_features, groups)
    if not torch.equal(channels.to(torch.int32), group_of_channels(in_features, groups, channels.device)):
        raise ValueError("its channels are grouped out of order (g_idx, desc_act)")
    zero = unpack(stored["qzeros"].contiguous(), bits, out_features)
    if entry.get("checkpoint_format", "gptq") != "gptq_v2":
        zero = from_stored_zeros(zero)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    return PackedWeight(
        words.T.contiguous(), scales.T.contiguous(), None if symmetric else zero.T.contiguous(),
        bits, group_size, in_features,
    )  # fmt: skip


def group_of_channels(in_features: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32, device=device) // (in_features // groups)
