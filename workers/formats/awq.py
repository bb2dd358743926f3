"""AutoAWQ's GEMM layout: qweight, qzeros and scales, packed along the output channels.

A linear of `in` x `out` gives qweight int32 (in, out/8), qzeros int32 (in/group, out/8) with true zero
points, scales float16 (in/group, out). Source: AutoAWQ `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.core.planning.format_limits import Scheme
from app.core.planning.plan import CandidatePlan
from kernels.operators import pack, unpack
from workers.formats.targets import expert_set, fused_names
from workers.modeling.quantized_weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4  # that the layout knows
CONFIG_FILE = None  # nothing beside config.json


def tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear; `dtype` of the model is not used: scales are always float16 here."""
    return {
        "qweight": pack(weight.q.T.contiguous(), BITS, interleaved=True),
        "qzeros": pack(weight.zero.T.contiguous(), BITS, interleaved=True),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
    }


def weight(stored: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `tensors`."""
    out_features = stored["scales"].shape[1]
    return QuantizedWeight(
        unpack(stored["qweight"], BITS, out_features, interleaved=True).T.contiguous(),
        stored["scales"].T.to(torch.float32).contiguous(),
        unpack(stored["qzeros"], BITS, out_features, interleaved=True).T.contiguous(),
        scheme,
    )


def shapes(
    out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a linear."""
    groups = scheme.groups(in_features)
    return {
        "qweight": ((in_features, out_features // 8), torch.int32),
        "qzeros": ((groups, out_features // 8), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


def quantization_config(candidate: CandidatePlan) -> dict[str, Any]:
    """The entry of config.json."""
    scheme = next(linear.scheme for linear in candidate.linears if linear.scheme is not None)  # the only one
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": kept_modules(candidate),
    }


def kept_modules(candidate: CandidatePlan) -> list[str]:
    """The modules that keep their precision, under the names of which loaders find one in a module's name.

    vLLM and SGLang ask for the experts of a layer together and for fused matrices: neither holds the name of
    a part. A layer's experts share one scheme, and so do the parts of a fused matrix.
    """
    kept: dict[str, None] = {}
    for name in candidate.kept:
        experts = expert_set(name)
        kept |= dict.fromkeys((name, *fused_names(name)) if experts is None else (experts,))
    return list(kept)
