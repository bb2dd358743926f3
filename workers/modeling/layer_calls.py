"""What decoder layers are called with beside the hidden states, and what they hand to later layers.

Most arguments are alike for all batches of a shape and are held once. Those that depend on the tokens are
held for each batch. A layer may also hand on values of its own: it returns them beside the states, or fills
a container that all layers are called with. Those belong to one model's way through the layers.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

LayerArguments = dict[str, Any]
CONTAINERS = (dict, UserDict, list)  # that a layer could fill
Twins = dict[int, tuple[Any, Any]]  # by id: a container, which keeps the id unique, and its copy


class Handed(NamedTuple):
    """Stands for what a layer returns beside the states, until the layer has run."""

    layer: int
    position: int  # in what it returns


class LayerForm(NamedTuple):
    """How a family's layers take and give the states."""

    outputs: int = 0  # the length of the tuple that a layer returns; 0: the states alone
    batch_axis: int = 0  # of the states; the tokens' axis comes next
    axes: int = 3  # of the states

    def inside(self, states: Tensor) -> Tensor:
        """States (batch, tokens, …) as layers take them."""
        axis = self.batch_axis
        return states if axis == 0 else states.movedim((0, 1), (axis, axis + 1))

    def outside(self, states: Tensor) -> Tensor:
        """A layer's states as (batch, tokens, …)."""
        axis = self.batch_axis
        return states if axis == 0 else states.movedim((axis, axis + 1), (0, 1))

    def output(self, states: Tensor, layer: int) -> Any:
        """What a layer returns, with marks for all but the states."""
        if self.outputs == 0:
            return states
        return (states, *(Handed(layer, position) for position in range(1, self.outputs)))


@dataclass(frozen=True)
class LayerCall:
    """One layer on one batch."""

    arguments: LayerArguments
    form: LayerForm
    keep: Callable[[tuple[Any, ...]], None] | None = None  # gets what the layer hands on

    def __call__(
        self, module: nn.Module, states: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """(batch, tokens, …) to the same; `weights` replace the module's own."""
        output: Tensor | tuple[Any, ...] = functional_call(
            module, dict(weights or {}), (self.form.inside(states),), self.arguments
        )
        first, others = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())
        if self.keep is not None:
            self.keep(others)
        return self.form.outside(first)


class LayerCalls:
    """The calls of all layers on all batches, for one model on its way through the layers.

    `recorded` has each layer's arguments by batch. Layers run in order; the last run of a layer on a batch
    decides what later ones get from it.
    """

    def __init__(self, recorded: list[list[LayerArguments]], form: LayerForm, device: torch.device) -> None:
        self.recorded, self.form, self.device = recorded, form, device
        self.on_host = False  # where what layers hand on waits
        self.handed: list[dict[Handed, Any]] = [{} for _ in recorded]
        self.readers = {
            value: layer
            for arguments in recorded[:1]
            for layer, each in enumerate(arguments)
            for value in each.values()
            if isinstance(value, Handed)
        }  # the last layer that gets it
        self.carried_names = [
            tuple(key for key, value in each.items() if isinstance(value, Handed) or is_empty(value))
            for each in (recorded[0] if recorded else ())
        ]

    @property
    def carries(self) -> bool:
        """Whether layers hand anything to later ones."""
        return any(self.carried_names)

    def fork(self) -> LayerCalls:
        """The calls of another model, before its first layer."""
        if not self.carries:
            return self
        copies: list[list[LayerArguments]] = []
        for batch in self.recorded:
            twins: Twins = {}
            copies.append([rebuilt(each, lambda value: value, twins) for each in batch])
        other = LayerCalls(copies, self.form, self.device)
        other.on_host = self.on_host
        return other

    def of(self, batch: int, layer: int, carried: LayerArguments | None = None) -> LayerCall:
        """The call of a layer on a batch; with `carried`, on what other layers hand to it nothing is kept."""
        if layer == len(self.recorded[batch]):
            return LayerCall({}, LayerForm())  # the head's step takes the states alone
        twins: Twins = {}
        arguments = {
            key: rebuilt(value, lambda leaf: self.placed(batch, leaf), twins)
            for key, value in self.recorded[batch][layer].items()
            if carried is None or key not in carried
        }
        if carried is not None or not self.carries:
            return LayerCall({**arguments, **(carried or {})}, self.form)

        def keep(others: tuple[Any, ...]) -> None:
            for name in self.carried_names[layer]:
                self.refill(self.recorded[batch][layer][name], self.rested(arguments[name]))
            values = self.handed[batch]
            for position, value in enumerate(others, start=1):
                if Handed(layer, position) in self.readers:
                    values[Handed(layer, position)] = self.rested(value)
            for handed in [each for each in values if self.readers[each] < layer]:
                del values[handed]

        return LayerCall(arguments, self.form, keep)

    def carried(self, batch: int, layer: int, windows: slice, size: int) -> LayerArguments:
        """What other layers hand to this one, for some windows of a batch of `size`."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            rows = leaf.shape[0] // size
            return leaf[windows.start * rows : windows.stop * rows]

        arguments = {key: self.recorded[batch][layer][key] for key in self.carried_names[layer]}
        whole = rebuilt(arguments, lambda leaf: self.placed(batch, leaf), {})
        parts: LayerArguments = rebuilt(whole, cut, {})
        return parts

    def placed(self, batch: int, leaf: Any) -> Any:
        """A value of the recorded arguments as the layer gets it."""
        if isinstance(leaf, Handed):
            return rebuilt(self.handed[batch][leaf], lambda value: self.placed(batch, value), {})
        return leaf.to(self.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    def rested(self, value: Any) -> Any:
        """What a layer hands on, where it waits for later layers."""
        if not self.on_host:
            return value
        return rebuilt(value, lambda leaf: on_host(leaf) if isinstance(leaf, Tensor) else leaf, {})

    def refill(self, container: Any, filled: Any) -> None:
        """Take over what a layer filled its copy of a container with."""
        if isinstance(container, list):
            container[:] = filled
        elif isinstance(container, dict | UserDict):
            container.clear()
            container.update(filled)


def rebuilt(value: Any, leaf: Callable[[Any], Any], twins: Twins) -> Any:
    """A copy of nested containers with other leaves. One container that is met twice has one copy."""
    if isinstance(value, Handed) or not isinstance(value, (*CONTAINERS, tuple)):
        return leaf(value)
    if isinstance(value, tuple):
        values = [rebuilt(each, leaf, twins) for each in value]
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    if id(value) not in twins:
        copy: Any = type(value)()
        twins[id(value)] = (value, copy)
        if isinstance(value, list):
            copy.extend(rebuilt(each, leaf, twins) for each in value)
        else:
            copy.update({key: rebuilt(each, leaf, twins) for key, each in value.items()})
    return twins[id(value)][1]


def alike(value: Any, other: Any) -> bool:
    """Whether nested containers hold equal tensors."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value.nan_to_num(), other.nan_to_num())
    if isinstance(value, Handed) or type(value) is not type(other):
        return bool(value == other)
    if isinstance(value, dict | UserDict):
        return value.keys() == other.keys() and all(alike(value[key], other[key]) for key in value)
    if isinstance(value, tuple | list):
        return len(value) == len(other) and all(alike(a, b) for a, b in zip(value, other, strict=True))
    return True


def is_empty(value: Any) -> bool:
    """Whether it is a container that waits to be filled by a layer."""
    return isinstance(value, CONTAINERS) and len(value) == 0


class ArgumentStore:
    """Recorded arguments of one batch after another; tensors that earlier batches had are held once."""

    def __init__(self) -> None:
        self.recorded: list[list[LayerArguments]] = []
        self.first: dict[tuple[int, ...], list[LayerArguments]] = {}  # by shape of the tokens

    def add(self, shape: tuple[int, ...], arguments: list[LayerArguments]) -> None:
        """The arguments of each layer for tokens of this shape."""
        first = self.first.setdefault(shape, arguments)
        if first is not arguments:
            sharing = Sharing()
            arguments = [
                {key: sharing.shared(value, other.get(key)) for key, value in each.items()}
                for each, other in zip(arguments, first, strict=True)
            ]
        self.recorded.append(arguments)


class Sharing:
    """Replaces tensors by equal ones of another batch."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, Any]] = {}  # by id; what has it is held, so that ids stay unique

    def shared(self, value: Any, other: Any) -> Any:
        """`value`, with tensors of `other` where they are alike, and in host memory where they aren't."""
        if id(value) not in self.seen:
            self.seen[id(value)] = (value, self.chosen(value, other))
        return self.seen[id(value)][1]

    def chosen(self, value: Any, other: Any) -> Any:
        if isinstance(value, Tensor):
            alike = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
            return other if alike and torch.equal(value, other) else on_host(value)
        if isinstance(value, Handed) or is_empty(value) or type(value) is not type(other):
            return value
        if isinstance(value, tuple | list) and len(value) == len(other) and not hasattr(value, "_fields"):
            return type(value)(self.shared(a, b) for a, b in zip(value, other, strict=True))
        if isinstance(value, dict):
            return {key: self.shared(each, other.get(key)) for key, each in value.items()}
        return value


def on_host(value: Tensor) -> Tensor:
    """A tensor that waits in pinned memory, so that a batch's own arguments take nothing of a GPU."""
    if value.device.type != "cuda":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
