"""Which layers are worked on expert by expert: those whose experts would take too much memory together."""

from __future__ import annotations

from app.core.planning.device_profile import DeviceKind
from app.core.planning.plan import Plan

# Of all experts of a layer in float32. Up to this a layer is held, with several copies of its weights.
EXPERT_BYTES: dict[DeviceKind, int] = {"cpu": 2**30, "cuda": 2**32}


def layers_by_expert(plan: Plan, device: DeviceKind) -> frozenset[int]:
    """The layers with more than EXPERT_BYTES of experts."""
    parameters = {linear.name: linear.parameters for linear in plan.candidates[0].linears}
    return frozenset(
        layer
        for layer in range(plan.num_layers)
        if 4 * sum(parameters.get(name, 0) for name in expert_names(plan, layer)) > EXPERT_BYTES[device]
    )


def held_parameters(plan: Plan, apart: frozenset[int]) -> int:
    """Of the layer with most in memory at once, where the layers in `apart` hold no expert."""
    largest = plan.layer_bytes // (4 if plan.dtype == "float32" else 2)
    if not apart:
        return largest
    sizes = {linear.name: linear.parameters for linear in plan.candidates[0].linears}
    whole, without = [], []
    for layer in range(plan.num_layers):
        prefix = plan.architecture.layer_prefix(layer)
        whole.append(sum(sizes.get(prefix + name, 0) for name in plan.architecture.at(layer).linears))
        experts = sum(sizes.get(name, 0) for name in expert_names(plan, layer))
        without.append(whole[-1] - (experts if layer in apart else 0))
    return largest - max(whole) + max(without)


def largest_expert_linear(plan: Plan, apart: frozenset[int]) -> int:
    """Parameters of the largest linear of an expert that is worked on alone."""
    names = {name for layer in apart for name in expert_names(plan, layer)}
    return max((each.parameters for each in plan.candidates[0].linears if each.name in names), default=0)


def expert_names(plan: Plan, layer: int) -> list[str]:
    """The linears of a layer's experts, by their full names."""
    prefix = plan.architecture.layer_prefix(layer)
    return [prefix + name for name in plan.architecture.expert_linears(layer)]
