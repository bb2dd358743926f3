"""A linear's tensors in any of the file formats, as the one packed weight that kernels take.

No linear is unpacked whole: what has to be packed anew passes through in slices of its output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from kernels.layouts import from_stored_zeros, packed_words
from kernels.operators import pack, unpack
from kernels.weight import PackedWeight

SLICE_VALUES = 2 * 1024**2  # unpacked at a time; as int64 while they are packed
WIDTHS = (2, 3, 4, 8)
AGAIN = "quantize the model again in one of the formats awq, gptq and compressed-tensors"

Stored = Mapping[str, Tensor]
QuantizationConfig = Mapping[str, Any]


def refused(name: str, why: str) -> ModelRefused:
    return ModelRefused(f"{name}: {why}", code="artifact_unsupported", remedy=AGAIN)


def group_size_of(name: str, in_features: int, groups: int) -> int:
    """-1 for one group in a row. Raises ModelRefused if the groups are not whole."""
    if groups == 1:
        return -1
    if in_features % groups:
        raise refused(name, f"{groups} groups don't divide in_features={in_features}")
    return in_features // groups


def from_compressed_tensors(name: str, stored: Stored, config: QuantizationConfig) -> PackedWeight:
    """`pack-quantized`: rows are dense already, zero points lie along the output channels."""
    if "weight_g_idx" in stored:
        raise refused(name, "its channels are grouped out of order (weight_g_idx)")
    out_features, in_features = (int(size) for size in stored["weight_shape"])
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    bits = next((bits for bits in WIDTHS if packed_words(in_features, bits) == packed.shape[1]), None)
    if bits is None or packed.shape[0] != out_features:
        raise refused(
            name, f"weight_packed {tuple(packed.shape)} is not ({out_features}, {in_features}) packed"
        )
    zero = None
    if "weight_zero_point" in stored:
        zero = unpack(stored["weight_zero_point"].contiguous(), bits, out_features, down=True)
    group_size = group_size_of(name, in_features, scale.shape[1])
    return PackedWeight(packed, scale.contiguous(), zero, bits, group_size, in_features)


def from_awq(name: str, stored: Stored, config: QuantizationConfig) -> PackedWeight:
    """AutoAWQ's GEMM layout: nibbles of eight output channels in a word."""
    words, scales = stored["qweight"], stored["scales"]
    in_features, out_features = words.shape[0], words.shape[1] * 8
    packed = torch.empty(out_features, packed_words(in_features, 4), dtype=torch.int32)
    step = max(1, SLICE_VALUES // (8 * in_features))
    for first in range(0, words.shape[1], step):
        part = words[:, first : first + step].contiguous()
        values = unpack(part, 4, 8 * part.shape[1], interleaved=True)
        packed[8 * first : 8 * (first + step)] = pack(values.T.contiguous(), 4)
    zero = unpack(stored["qzeros"].contiguous(), 4, out_features, interleaved=True).T.contiguous()
    group_size = group_size_of(name, in_features, scales.shape[0])
    return PackedWeight(packed, scales.T.contiguous(), zero, 4, group_size, in_features)


def from_gptq(name: str, stored: Stored, config: QuantizationConfig) -> PackedWeight:
    """GPTQ: a column's words are a row of ours. The first version stores zero points less one."""
    words, scales = stored["qweight"], stored["scales"]
    in_features, (groups, out_features) = stored["g_idx"].shape[0], scales.shape
    bits = words.shape[0] * 32 // in_features
    if bits not in WIDTHS or packed_words(in_features, bits) != words.shape[0]:
        raise refused(name, f"qweight {tuple(words.shape)} does not hold in_features={in_features}")
    group_size = group_size_of(name, in_features, groups)
    expected = torch.arange(in_features, dtype=torch.int32) // (in_features // groups)
    if not torch.equal(stored["g_idx"].to(torch.int32), expected):
        raise refused(name, "its channels are grouped out of order (g_idx, desc_act)")
    stored_zeros = unpack(stored["qzeros"].contiguous(), bits, out_features)
    if config.get("checkpoint_format", "gptq") == "gptq_v2":
        zero = stored_zeros
    else:
        zero = from_stored_zeros(stored_zeros)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    return PackedWeight(
        words.T.contiguous(), scales.T.contiguous(), None if symmetric else zero.T.contiguous(),
        bits, group_size, in_features,
    )  # fmt: skip


Reader = Callable[[str, Stored, QuantizationConfig], PackedWeight]
# What of a linear is packed, by `quant_method`: the tensor that marks it, all of them, and who reads them.
READERS: dict[str, tuple[str, tuple[str, ...], Reader]] = {
    "compressed-tensors": (
        "weight_packed",
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        from_compressed_tensors,
    ),
    "awq": ("qweight", ("qweight", "qzeros", "scales"), from_awq),
    "gptq": ("qweight", ("qweight", "qzeros", "scales", "g_idx"), from_gptq),
}


def check_config(config: QuantizationConfig) -> str:
    """The `quant_method` of a config.json's entry. Raises ModelRefused for what can't be read."""
    method = config.get("quant_method")
    what = "the artifact"
    if method not in READERS:
        raise refused(what, f"quant_method {method!r} is not one of {', '.join(sorted(READERS))}")
    if method == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        raise refused(what, f"AWQ's layout {config.get('version')!r} is not gemm")
    if method == "compressed-tensors" and config.get("format") != "pack-quantized":
        raise refused(what, f"the compressed-tensors format {config.get('format')!r} is not pack-quantized")
    groups = (config.get("config_groups") or {}).values() if method == "compressed-tensors" else ()
    if any(group.get("input_activations") for group in groups):
        raise refused(what, "quantized activations are not computed here, only weights")
    return str(method)
