"""What a text's forward pass calls: the decoder's layers with their arguments, and each layer's modules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from workers.discovery.random_weights import refused

TOKENS = 24
TOLERANCE = 1e-5


@dataclass(frozen=True)
class TracedCall:
    """Arguments of a module, as they were before the call."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def copied(self) -> TracedCall:
        return TracedCall(*(tree_map(cloned, each) for each in (self.positional, self.named)))

    @property
    def states(self) -> Tensor:
        """The first argument that can be hidden states."""
        states = first_states((self.positional, self.named))
        if states is None:
            raise refused("a layer is called without hidden states")
        return states


@dataclass(frozen=True)
class TracedLayer:
    """One decoder layer of a text's forward pass; `output` is of its hidden states."""

    path: str
    module: nn.Module
    call: TracedCall
    output: Tensor


@dataclass
class Trace:
    """Modules of a layer in the order of their calls, with digests of what they read and return."""

    order: list[str] = field(default_factory=list)
    inputs: dict[str, list[bytes]] = field(default_factory=dict)
    outputs: dict[str, list[bytes]] = field(default_factory=dict)


def cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def first_states(value: Any) -> Tensor | None:
    return next((each for each in tree_leaves(value) if is_states(each)), None)


def digest(value: Tensor | None) -> bytes:
    """Equal for tensors with the same numbers in the same order, whatever their shape."""
    if value is None:
        return b""
    return hashlib.blake2b(value.detach().float().contiguous().numpy().tobytes(), digest_size=16).digest()


def some_ids(seed: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 400, (1, tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids, use_cache=False).logits
    return output


def called_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules that a text reaches."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    with hooked(handles):
        logits_of(model, some_ids())
    return called


def find_layers(model: PreTrainedModel) -> str:
    """The path of the module list that holds most parameters of those that a text's forward pass calls.

    Raises ModelRefused if there is none.
    """
    called = called_modules(model)
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(outer + ".") for outer in sizes)
        if not isinstance(module, nn.ModuleList) or inner:
            continue
        if any(f"{path}.{number}" in called for number in range(len(module))):
            sizes[path] = sum(p.numel() for p in module.parameters())
    if not sizes:
        raise refused("its forward pass calls no list of layers")
    return max(sizes, key=lambda path: sizes[path])


def traced_layers(model: PreTrainedModel, path: str) -> list[TracedLayer]:
    """Every layer's call and output.

    Raises ModelRefused unless each is called once, with the output of the one before.
    """
    layers = list(model.get_submodule(path))
    calls: list[tuple[int, TracedCall]] = []
    outputs: list[Tensor | None] = []
    handles: list[Any] = []
    for number, layer in enumerate(layers):

        def before(_: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
            calls.append((number, TracedCall(args, kwargs).copied()))

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(
            layer.register_forward_hook(lambda _m, _a, out: outputs.append(cloned(first_states(out))))
        )
    with hooked(handles):
        logits_of(model, some_ids())
    if [number for number, _ in calls] != list(range(len(layers))):
        raise refused("its layers are not called once each, one after another")
    traced: list[TracedLayer] = []
    for (number, call), output in zip(calls, outputs, strict=True):
        if output is None:
            raise refused("a layer returns no hidden states")
        if traced and not torch.equal(traced[-1].output, call.states):
            raise refused("a layer reads something else than the output of the layer before it")
        traced.append(TracedLayer(f"{path}.{number}", layers[number], call, output))
    return traced


def run(layer: nn.Module, call: TracedCall, weights: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Every tensor that a call of the layer returns or leaves in its arguments; its hidden states first."""
    fresh = call.copied()
    if weights is None:
        output = layer(*fresh.positional, **fresh.named)
    else:
        output = torch.func.functional_call(layer, weights, fresh.positional, fresh.named)
    return [v for v in tree_leaves((output, fresh.positional, fresh.named)) if isinstance(v, Tensor)]


def unchanged(values: list[Tensor], expected: list[Tensor], residual: Tensor) -> bool:
    """Whether two runs of a layer agree token by token in what it adds to `residual`, and in all else."""
    if len(values) != len(expected):
        return False
    for number, (value, other) in enumerate(zip(values, expected, strict=True)):
        if value.shape != other.shape:
            return False
        if torch.equal(value, other):
            continue
        if not value.is_floating_point():
            return False
        added = other - residual if number == 0 and other.shape == residual.shape else other
        error, size = (each.norm(dim=-1) for each in (value - other, added))
        if not bool((error <= TOLERANCE * size).all()):
            return False
    return True


def trace(layer: nn.Module, call: TracedCall) -> Trace:
    record = Trace()
    handles: list[Any] = []
    for name, module in layer.named_modules():
        if not name:
            continue

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if name not in record.inputs:
                record.order.append(name)
            record.inputs.setdefault(name, []).append(digest(first_states((args, kwargs))))

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            record.outputs.setdefault(name, []).append(digest(first_states(output)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    with hooked(handles):
        run(layer, call)
    return record
