"""The weights of one decoder layer by name, of which the experts' may be made whenever they are looked up.

A layer whose experts are too many to be held is read, scaled and rounded expert by expert: what looks up a
weight lets it go before it looks up the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

Weights = Mapping[str, Tensor]
T = TypeVar("T")


class LookedUp(Mapping[str, T]):
    """Values that are made anew at every look-up."""

    def __init__(self, names: Collection[str], make: Callable[[str], T]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> T:
        return self.make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Deferred(NamedTuple):
    """A weight that is read or computed when it is looked up."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class DeferredWeights(Weights):
    """Weights that are in memory, and others that are made anew at every look-up."""

    def __init__(self, held: Weights, deferred: Mapping[str, Deferred]) -> None:
        self.held, self.deferred = held, deferred

    def __getitem__(self, name: str) -> Tensor:
        return self.deferred[name].make() if name in self.deferred else self.held[name]

    def __contains__(self, name: object) -> bool:
        return name in self.held or name in self.deferred

    def __iter__(self) -> Iterator[str]:
        yield from self.held
        yield from self.deferred

    def __len__(self) -> int:
        return len(self.held) + len(self.deferred)


def held(weights: Weights) -> Weights:
    """Those in memory."""
    return weights.held if isinstance(weights, DeferredWeights) else weights


def deferred(weights: Weights) -> Mapping[str, Deferred]:
    """Those that are made at look-up."""
    return weights.deferred if isinstance(weights, DeferredWeights) else {}


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """Of a weight, which need not be made for it."""
    later = deferred(weights)
    return later[name].shape if name in later else tuple(weights[name].shape)


def changed(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    """Each weight as `change` returns it for its name, in its shape: at once, or when it is looked up."""
    now = {name: change(name, value) for name, value in held(weights).items()}
    later = deferred(weights)
    if not later:
        return now

    def result(name: str) -> Tensor:
        return change(name, later[name].make())

    return DeferredWeights(
        now, {name: Deferred(each.shape, partial(result, name)) for name, each in later.items()}
    )


def replaced(weights: Weights, others: Weights) -> Weights:
    """The weights with `others` in place of those of the same name."""
    now, later = {**held(weights), **held(others)}, {**deferred(weights), **deferred(others)}
    if not later:
        return now
    for name in deferred(others):
        now.pop(name, None)
    for name in held(others):
        later.pop(name, None)
    return DeferredWeights(now, later)


@contextmanager
def filled_when_called(
    layer: nn.Module, makes: dict[str, Callable[[], Tensor]], computed: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Parameters of a layer are made, by name, before their module runs, and go after it."""
    with ExitStack() as stack:
        for name, make in makes.items():
            path, _, last = name.rpartition(".")
            module = layer.get_submodule(path)
            absent = getattr(module, last)

            def fill(module: nn.Module, _inputs: Any, last: str = last, make: Any = make) -> None:
                setattr(module, last, nn.Parameter(computed(make()), requires_grad=False))

            def empty(
                module: nn.Module,
                _inputs: Any = (),
                _output: Any = None,
                last: str = last,
                absent: Any = absent,
            ) -> None:
                setattr(module, last, absent)

            stack.callback(empty, module)  # also where the run was ended before its end
            stack.callback(module.register_forward_pre_hook(fill).remove)
            stack.callback(module.register_forward_hook(empty).remove)
        yield
