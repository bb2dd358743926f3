"""A layer that runs again while its linears are rounded in turn: what is settled is not computed again.

Each run goes a little further than the one before. Modules whose weights and inputs are those of that run
replay their outputs. One that gives what the linear gives that is rounded next is replayed from that linear's
input. The layer's own code runs between them, so a replay has the bits of a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.core.planning.architectures import Architecture, ScaleGroup

REPLAYED_BYTES = 2 * 2**30  # of outputs that wait, over all batches; what is beyond is computed again


@dataclass(frozen=True)
class Settled:
    """How far the rounding of a layer has come. Names are those of the checkpoint."""

    linears: dict[str, str]  # all that are rounded: the modules' names
    changing: frozenset[str]  # those that are not final yet; without any no output is stored
    silent: str | None = None  # the one that gives zeros or its bias, in place of what it would give

    @classmethod
    def before(cls, architecture: Architecture, first: int | None, silent: str | None = None) -> Settled:
        """With the groups from the `first` on to be rounded; None: all are."""
        changing = () if first is None else architecture.groups[first:]
        return cls(
            {
                name: architecture.module_name(name)
                for group in architecture.groups
                for name in group.balance_layers
            },
            frozenset(name for group in changing for name in group.balance_layers),
            silent,
        )

    @property
    def open_modules(self) -> set[str]:
        return {self.linears[name] for name in self.changing}


@dataclass(frozen=True)
class ModuleOutput:
    """What a module gave on a batch, or the input of the linear that it ends with."""

    value: Any
    versions: tuple[int, ...]  # of its tensors; changes in place count them up
    end: str | None = None  # that linear
    length: int = 0  # of the tuple that it gives, with nothing but the first; 0: no tuple

    @classmethod
    def of(cls, value: Any, end: str | None = None, length: int = 0) -> ModuleOutput | None:
        """None for what is not of tensors."""
        leaves = value if isinstance(value, tuple) else (value,)
        if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
            return None
        return cls(value, tuple(tensor._version for tensor in tensors_of(value)), end, length)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was written over it."""
        return self.versions == tuple(tensor._version for tensor in tensors_of(self.value))

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors_of(self.value))


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in (value if isinstance(value, tuple) else (value,)) if leaf is not None]


@dataclass
class LayerRun:
    """One run of a layer on one batch."""

    outputs: dict[str, ModuleOutput]
    stores: bool  # until a linear runs that is not final
    called: set[str] = field(default_factory=set)
    ending: tuple[str, Tensor, Tensor] | None = None  # the silent linear, its input and its output


class SettledOutputs:
    """Outputs of the modules of one layer, by batch, for as long as the weights behind them stay."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.batches: dict[int, dict[str, ModuleOutput]] = {}
        self.fixed: dict[str, Tensor] = {}  # the weights behind the outputs
        self.repeated: set[str] = set()  # modules that a run calls more than once
        self.bytes = 0

    @contextmanager
    def running(
        self, layer: nn.Module, weights: Mapping[str, Tensor], settled: Settled
    ) -> Iterator[Callable[[int], None]]:
        """Let modules of a layer with these weights replay; yields a function to name the next batch with."""
        fixed = {
            name: value for name, value in weights.items() if name.rpartition(".")[0] not in settled.changing
        }
        if not all(same(value, fixed.get(name)) for name, value in self.fixed.items()):
            self.clear()
        self.fixed = fixed
        player = Player(self, layer, settled)
        names = {name for name, _ in layer.named_children()} | set(settled.linears.values())
        with replaced_forwards(
            {layer.get_submodule(name): player.forward_of(name) for name in sorted(names)}
        ):
            yield player.begin

    def store(self, turn: LayerRun, name: str, output: ModuleOutput | None) -> None:
        """In place of what modules within this one gave."""
        for inner in [each for each in turn.outputs if each == name or each.startswith(name + ".")]:
            self.bytes -= turn.outputs.pop(inner).bytes
        if output is not None and name not in self.repeated and self.bytes + output.bytes <= REPLAYED_BYTES:
            turn.outputs[name] = output
            self.bytes += output.bytes


class Player:
    """The forward passes of a layer's modules while it runs on one batch after the other."""

    def __init__(self, replay: SettledOutputs, layer: nn.Module, settled: Settled) -> None:
        self.replay, self.layer, self.settled = replay, layer, settled
        self.open = settled.open_modules
        self.silent = None if settled.silent is None else settled.linears[settled.silent]
        self.turn = LayerRun({}, False)

    def begin(self, batch: int) -> None:
        """The layer is called on this batch next."""
        outputs = self.replay.batches.setdefault(batch, {})
        self.turn = LayerRun(outputs, stores=bool(self.open))

    def forward_of(self, name: str) -> Callable[..., Any]:
        """The forward pass of a module."""
        module = self.layer.get_submodule(name)
        own = module.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            turn = self.turn
            if name in turn.called:
                self.replay.repeated.add(name)
            turn.called.add(name)
            output = turn.outputs.get(name)
            if output is not None and name not in self.replay.repeated and output.is_whole:
                value = self.replayed(output)
            elif name == self.silent:
                value = silence(module, arguments[0])
                if turn.stores:
                    turn.ending = (name, arguments[0], value)
                turn.stores = False
            else:
                turn.stores = turn.stores and name not in self.open
                value = own(*arguments, **named)
            if turn.stores and (output is None or output.end is not None):
                self.replay.store(turn, name, ModuleOutput.of(value))
            elif turn.ending is not None and turn.ending[0].startswith(name + "."):
                self.replay.store(turn, name, ended(value, *turn.ending))
            return value

        return forward

    def replayed(self, output: ModuleOutput) -> Any:
        if output.end is None:
            return output.value
        value = self.layer.get_submodule(output.end)(output.value)
        return (value, *[None] * (output.length - 1)) if output.length else value


def same(value: Tensor, other: Tensor | None) -> bool:
    return value is other or (other is not None and torch.equal(value, other))


def can_be_silent(layer: nn.Module, architecture: Architecture, group: ScaleGroup) -> bool:
    """Whether what the copy lacks of the stream can be told from the stream without the group's output."""
    (name, *others) = group.balance_layers
    module = layer.get_submodule(architecture.module_name(name))
    return group.joins is not None and not others and type(module) is nn.Linear


def silence(linear: nn.Module, states: Tensor) -> Tensor:
    """What a linear gives without its weight."""
    assert isinstance(linear, nn.Linear)
    shape, bias = (*states.shape[:-1], linear.out_features), dict(linear.named_parameters()).get("bias")
    return states.new_zeros(shape) if bias is None else bias.expand(shape).clone()


def ended(value: Any, linear: str, states: Tensor, silent: Tensor) -> ModuleOutput | None:
    """The input of the linear that a module ends with, if the module gives what the linear gives."""
    if value is silent:
        return ModuleOutput.of(states, linear)
    if isinstance(value, tuple) and value[0] is silent and all(each is None for each in value[1:]):
        return ModuleOutput.of(states, linear, len(value))
    return None


@contextmanager
def replaced_forwards(runs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forward passes."""
    before = {module: module.__dict__.get("forward") for module in runs}
    for module, run in runs.items():
        module.forward = run
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own
