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


def expert_names(plan: Plan, layer: int) -> list[str]:
    """The linears of a layer's experts, by their full names."""
    prefix = plan.architecture.layer_prefix(layer)
    return [prefix + name for name in plan.architecture.expert_linears(layer)]
