"""The GPTQ layout, first version: qweight packed down the input channels, zero points less one.

A linear of `in` x `out` gives qweight int32 (in * bits / 32, out), qzeros int32 (in/group, out * bits / 32),
scales float16 (in/group, out) and g_idx int32 (in), the group of each input channel. Source: GPTQModel
`nn_modules/qlinear`, where the first version is the checkpoint format `gptq`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from app.core.planning.format_limits import Scheme, common_scheme
from app.core.planning.plan import CandidatePlan
from kernels.layouts import from_stored_zeros, packed_words, to_stored_zeros
from kernels.operators import pack, unpack
from workers.formats.targets import compact_patterns, expert_set, fused_names
from workers.modeling.quantized_weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
CONFIG_FILE = "quantize_config.json"  # GPTQ's own place for what is in config.json too


def tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear; `dtype` of the model is not used: scales are always float16 here."""
    bits = weight.scheme.bits
    return {
        "qweight": pack(weight.q.T.contiguous(), bits, down=True),
        "qzeros": pack(to_stored_zeros(weight.zero.T.contiguous()), bits),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
        "g_idx": group_of_channels(weight.scheme, weight.shape[1]).to(weight.q.device),
    }


def weight(stored: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `tensors`. Raises ValueError if the channels are not grouped in their order."""
    in_features, out_features = stored["g_idx"].shape[0], stored["scales"].shape[1]
    if not torch.equal(stored["g_idx"], group_of_channels(scheme, in_features).to(stored["g_idx"].device)):
        raise ValueError("g_idx does not name consecutive groups")
    return QuantizedWeight(
        unpack(stored["qweight"], scheme.bits, in_features, down=True).T.contiguous(),
        stored["scales"].T.to(torch.float32).contiguous(),
        from_stored_zeros(unpack(stored["qzeros"], scheme.bits, out_features)).T.contiguous(),
        scheme,
    )


def group_of_channels(scheme: Scheme, in_features: int) -> Tensor:
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    return torch.arange(in_features, dtype=torch.int32) // group_size


def shapes(
    out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a linear."""
    groups = scheme.groups(in_features)
    return {
        "qweight": ((packed_words(in_features, scheme.bits), out_features), torch.int32),
        "qzeros": ((groups, packed_words(out_features, scheme.bits)), torch.int32),
        "scales": ((groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }


def quantization_config(candidate: CandidatePlan) -> dict[str, Any]:
    """The entry of config.json: the scheme of most linears, and `dynamic` for the others."""
    base = common_scheme(linear.scheme for linear in candidate.linears)
    dynamic = dynamic_rules(candidate, base)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": base.bits,
        "group_size": base.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"nibble:{version('nibble')}"]},
    }


def dynamic_rules(candidate: CandidatePlan, base: Scheme) -> dict[str, dict[str, int]]:
    """GPTQModel's rules by name: `-:` keeps a module's precision, `+:` gives it another scheme."""
    modules: dict[str, Scheme | None] = {linear.name: linear.scheme for linear in candidate.linears}
    modules |= dict.fromkeys((name for name in candidate.full_precision if name != "lm_head"), None)
    # The whole has the scheme of its parts: sets that servers fuse share one.
    modules |= {whole: scheme for name, scheme in modules.items() for whole in wholes(name)}
    rules: dict[str, dict[str, int]] = {}
    for scheme in dict.fromkeys(modules.values()):
        if scheme == base:
            continue
        for pattern in compact_patterns([name for name in modules if modules[name] == scheme], modules):
            if scheme is None:
                rules["-:" + pattern] = {}
            else:
                rules["+:" + pattern] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return rules


def wholes(name: str) -> tuple[str, ...]:
    """The names by which vLLM asks for what the linear is a part of: the experts of a layer are one."""
    experts = expert_set(name)
    return fused_names(name) if experts is None else (experts,)
