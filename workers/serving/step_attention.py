"""Attention of steps, in the place where transformers' models look theirs up: one new token for each row.

Query heads that share a key/value head are rows of one product, so that no key is repeated or read twice.
Prompts, and whatever a step's attention does not know, take the way that the model took before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KINDS = ("grouped", "split")
SPLIT_SIZES = (16, 32, 64, 128, 256)  # of heads

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query (rows, heads, size) over keys and values (rows, kv heads, columns, size): (rows, heads, value
    size), where the bool mask (rows, columns) shows; by PyTorch's own kernel over all columns.
    """
    rows, kv_heads, _, size = keys.shape
    output = functional.scaled_dot_product_attention(
        query.view(rows, kv_heads, -1, size), keys, values, attn_mask=mask[:, None, None, :], scale=scale
    )
    return output.reshape(rows, query.shape[1], -1)


def split(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by kernels that skip the columns that no mask shows, and share the others among processors."""
    from kernels.triton_backend.attention_kernel import attend

    if keys.shape[3] not in SPLIT_SIZES or values.shape[3] not in SPLIT_SIZES:
        return grouped(query, keys, values, mask, scale)
    upcast = query.dtype == torch.float32
    return attend(query, keys, values, mask, scale, processors=processors_of(query.device), upcast=upcast)


@functools.cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention(attend: Attend) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An entry for transformers' table, by `attend` where one token of each row sees what a mask shows."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, size = query.shape[2:]
        if tokens > 1 or attention_mask is None or not alike(attention_mask, options):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
        scale = options.get("scaling")
        scale = size**-0.5 if scale is None else scale
        output = attend(query[:, :, 0], key, value, attention_mask[:, 0, 0], scale)
        return output[:, None], None

    return forward


def alike(mask: Tensor, options: dict[str, Any]) -> bool:
    """Whether a call is plain attention under one mask for all heads."""
    further = ("position_bias", "softcap", "s_aux")
    plain = not options.get("dropout") and all(options.get(name) is None for name in further)
    return plain and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1


ENTRIES: dict[str, Attend] = {"grouped": grouped, "split": split}


def use_step_attention(model: PreTrainedModel, kind: str) -> str:
    """Let `model` attend by that kind where it took PyTorch's own attention: the name of what it takes."""
    before = str(model.config.get_text_config()._attn_implementation)
    if before != "sdpa":
        return before  # sinks, soft caps and other things of the model's own
    name = f"nibble_{kind}"
    AttentionInterface.register(name, attention(ENTRIES[kind]))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return name
