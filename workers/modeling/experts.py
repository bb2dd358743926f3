"""Experts as the linears that checkpoints hold.

transformers fuses a block's experts into two 3-D tensors. One linear per projection and expert has the
names of the checkpoint, can be observed on its own, and sees only the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.core.planning.architectures import Experts


class Expert(nn.Module):
    """down(activation(gate(x)) * up(x)), under the checkpoint's names."""

    def __init__(
        self, names: Experts, shape: tuple[int, int], activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        hidden, inner = shape
        self.names, self.activation = names, activation
        self.add_module(names.gate, nn.Linear(hidden, inner, bias=False))
        self.add_module(names.up, nn.Linear(hidden, inner, bias=False))
        self.add_module(names.down, nn.Linear(inner, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in (self.names.gate, self.names.up, self.names.down))
        output: Tensor = down(self.activation(gate(x)) * up(x))
        return output


class SplitExperts(nn.ModuleList):
    """Replaces transformers' fused experts; computes the same sum over the experts of each token."""

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """states: (tokens, hidden); chosen and weights: (tokens, experts per token)."""
        output = torch.zeros_like(states)
        for number, expert in enumerate(self):
            token, slot = torch.where(chosen == number)
            if token.numel():
                share = expert(states[token]) * weights[token, slot, None]
                output.index_add_(0, token, share.to(output.dtype))
        return output


def split_experts(layer: nn.Module, names: Experts) -> None:
    """Replace the fused experts of a decoder layer, if it has any."""
    *path, last = names.module.split(".")
    block: nn.Module | None = layer
    for attribute in path:
        block = getattr(block, attribute, None)
    fused = getattr(block, last, None)
    if fused is None:
        return
    count, hidden, inner = fused.down_proj.shape
    with torch.device("meta"):
        split = SplitExperts(Expert(names, (hidden, inner), fused.act_fn) for _ in range(count))
    layer.set_submodule(names.module, split.requires_grad_(requires_grad=False).eval())
