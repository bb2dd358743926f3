"""Where a group's output is added to the residual stream as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from app.core.planning.family import EXPERT, LAYER_OUTPUT, ScaleGroup
from workers.discovery.layer_tracing import first_states, hooked, run
from workers.discovery.smooth_layers import LayerProbe

CLOSE = 1e-5


def joined(probe: LayerProbe, group: ScaleGroup) -> ScaleGroup:
    """The group with the module that reads the sum of the stream and its output, or the layer's output.

    Something small is added to what the group's linear returns: where exactly that arrives, it is the sum.
    """
    (name, *others) = group.balance_layers
    residual = probe.call.states
    if others or EXPERT in name or probe.rows(name) != residual.shape[-1]:
        return group
    added = torch.randn(residual.shape, generator=torch.Generator().manual_seed(2)) / 8
    before, after = inputs_of(probe, name, None), inputs_of(probe, name, added)
    own = probe.trace.outputs[name][0]
    for reader in probe.trace.order[probe.trace.order.index(name) + 1 :]:
        reads_output = own in probe.trace.inputs[reader]
        if not reads_output and reader in before and arrives(before[reader], after[reader], added):
            return group.model_copy(update={"joins": reader})
    if arrives(before[LAYER_OUTPUT], after[LAYER_OUTPUT], added):
        return group.model_copy(update={"joins": LAYER_OUTPUT})
    return group


def arrives(before: Tensor, after: Tensor, added: Tensor) -> bool:
    if before.numel() != added.numel():
        return False
    if after.shape != before.shape:  # of an expert: other tokens are routed to it
        return False
    error = (after - before).flatten() - added.flatten()
    return bool(error.norm() <= CLOSE * (before.norm() + added.norm()))


def inputs_of(probe: LayerProbe, name: str, added: Tensor | None) -> dict[str, Tensor]:
    """What each module first reads, and the layer's output, with something added to a linear's output."""
    inputs: dict[str, Tensor] = {}
    handles: list[Any] = []

    def add(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        same_size = added is not None and added.numel() == output.numel()
        return output + added.view(output.shape) if added is not None and same_size else None

    for each in probe.trace.order:

        def before(_: nn.Module, args: Any, kwargs: Any, each: str = each) -> None:
            states = first_states((args, kwargs))
            if states is not None:
                inputs.setdefault(each, states.clone())

        handles.append(probe.modules[each].register_forward_pre_hook(before, with_kwargs=True))
    handles.append(probe.modules[name].register_forward_hook(add))
    with hooked(handles):
        inputs[LAYER_OUTPUT] = run(probe.layer, probe.call)[0]
    return inputs
