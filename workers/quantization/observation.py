"""Inputs of chosen modules of a layer while it runs: what its linears read, and the stream after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor, nn

from app.core.planning.architectures import LAYER_OUTPUT, Architecture, ScaleGroup
from workers.modeling.layer_calls import LayerCall

References = list[dict[str, Tensor]]  # of each batch, by module: (tokens, C)


class Reached(Exception):
    """All watched modules were called."""


class Seen:
    """Inputs of the watched modules in the last run of a layer."""

    def __init__(self, watched: set[str], *, whole: bool) -> None:
        self.watched, self.whole = watched, whole
        self.inputs: dict[str, Tensor] = {}

    def note(self, name: str, value: Tensor) -> None:
        self.inputs[name] = value
        if not self.whole and self.watched <= self.inputs.keys():
            raise Reached

    def run(
        self, module: nn.Module, state: dict[str, Tensor], batch: Tensor, call: LayerCall
    ) -> dict[str, Tensor]:
        """Inputs by name, and the layer's output if it was run to its end; `state` replaces its weights."""
        self.inputs = {}
        with suppress(Reached):
            self.inputs[LAYER_OUTPUT] = call(module, batch, state)
        return {name: value.reshape(-1, value.shape[-1]).float() for name, value in self.inputs.items()}

    def reference(self, module: nn.Module, batch: Tensor, call: LayerCall) -> dict[str, Tensor]:
        """The same for the module's own weights, in the dtype of the states."""
        values = self.run(module, {}, batch, call)
        return {name: value.to(batch.dtype) for name, value in values.items()}


def reference_names(architecture: Architecture) -> set[str]:
    """What the original gives that a copy's groups are compared with, and the layer's output."""
    groups = (group for group in architecture.groups if group.expert is None)
    return {LAYER_OUTPUT, *(group.joins or group.source for group in groups)}


@contextmanager
def watching(module: nn.Module, architecture: Architecture, groups: Sequence[ScaleGroup]) -> Iterator[Seen]:
    """Record the inputs of the groups' linears, and the residual stream after them."""
    names = {name for group in groups for name in (group.source, group.joins) if name is not None}
    with watching_names(module, architecture, names) as seen:
        yield seen


@contextmanager
def watching_names(module: nn.Module, architecture: Architecture, names: set[str]) -> Iterator[Seen]:
    """Record the inputs of modules of a layer, and its output where LAYER_OUTPUT is among them."""
    seen = Seen(names - {LAYER_OUTPUT}, whole=LAYER_OUTPUT in names)

    def noting(name: str):  # type: ignore[no-untyped-def]  # a hook of torch
        return lambda _module, inputs: seen.note(name, inputs[0])

    hooks = [
        module.get_submodule(architecture.module_name(name)).register_forward_pre_hook(noting(name))
        for name in sorted(seen.watched)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
