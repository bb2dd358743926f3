"""The groups of one layer, and which module before each can absorb its scales.

A candidate is accepted only if the layer with powers of two folded in, by the same code that folds a job's
scales, computes what it did: powers of two are exact in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.core.planning.family import EXPERT, LEAST_ROWS, ScaleGroup
from workers.discovery.layer_tracing import Trace, TracedCall, run, trace, unchanged
from workers.modeling.experts import Expert, SplitExperts
from workers.quantization.folding import Heads, fold_of, fold_scales
from workers.quantization.scale_search import ScaleChoice

NEAREST = 12  # linears before a group that are tried
UNSCALED = "no scales: no layer before it can absorb them"
HEAD_KEYS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
    ("num_attention_heads", "num_global_key_value_heads"),
    ("n_head", "num_key_value_heads"),
    ("n_heads", "num_key_value_heads"),
    ("num_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("mamba_n_heads", "mamba_n_groups"),
    ("mamba_num_heads", "n_groups"),
)
POWERS_OF_TWO = torch.tensor([0.25, 0.5, 2.0, 4.0])


@dataclass(frozen=True)
class SplitBlock:
    """Experts of a layer, after they were split into linears."""

    path: str
    count: int
    up: tuple[str, ...]  # names of an expert's linears that read its input
    down: str

    def templates(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{self.path}.{EXPERT}.{name}" for name in names)


class LayerProbe:
    """One layer with its call and what it computes; tells whether a fold leaves that as it is."""

    def __init__(self, layer: nn.Module, call: TracedCall, config: Mapping[str, object]) -> None:
        self.layer, self.call, self.heads = layer, call, Heads.of(config)
        self.weights = layer.state_dict()
        self.expected = run(layer, call)
        self.trace: Trace = trace(layer, call)
        self.modules: dict[str, nn.Module] = dict(layer.named_modules())
        self.block = split_block(self.modules)

    @property
    def repeatable(self) -> bool:
        return unchanged(run(self.layer, self.call), self.expected, self.call.states)

    def columns(self, group: ScaleGroup) -> int:
        return int(self.weights[group.balance_layers[0].replace(EXPERT, "0") + ".weight"].shape[1])

    def rows(self, name: str) -> int:
        return int(self.weights[name.replace(EXPERT, "0") + ".weight"].shape[0])

    def expanded(self, group: ScaleGroup) -> tuple[ScaleGroup, ...]:
        return group.expanded(self.block.count if self.block else 0)

    def holds(self, groups: Sequence[ScaleGroup]) -> bool:
        """Whether the layer computes the same with random scales in all these groups."""
        generator = torch.Generator().manual_seed(1)
        each = [one for group in groups for one in self.expanded(group)]
        try:
            choices: list[ScaleChoice | None] = [self.choice(group, generator) for group in each]
            weights = dict(fold_scales(self.weights, self.heads, each, choices))
        except (AssertionError, IndexError, KeyError, RuntimeError, ZeroDivisionError):
            return False  # the candidate's rows do not exist in this layer
        return unchanged(run(self.layer, self.call, weights), self.expected, self.call.states)

    def choice(self, group: ScaleGroup, generator: torch.Generator) -> ScaleChoice:
        """Random powers of two, equal where channels share a scale."""
        fold = fold_of(self.weights, self.heads, group, torch.float32)
        columns = self.weights[group.balance_layers[0] + ".weight"].shape[1]
        drawn = POWERS_OF_TWO[torch.randint(0, 4, (columns,), generator=generator)]
        if fold.head_shape is not None:
            drawn = drawn.view(fold.head_shape)[:, :1].expand(fold.head_shape).flatten()
        return ScaleChoice(drawn, 0.0, 0.0, 0.0, 0.0)


def split_block(modules: Mapping[str, nn.Module]) -> SplitBlock | None:
    for path, module in modules.items():
        if isinstance(module, SplitExperts):
            first = module.get_submodule("0")
            assert isinstance(first, Expert)
            names = first.names
            read = (names.gate, names.up) if module.form.gated else (names.up,)
            return SplitBlock(path, module.form.count, read, names.down)
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear does; some classes of it don't."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    some = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(4))
    try:
        output = module(some)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, Tensor) and unchanged(
        [output], [nn.functional.linear(some, module.weight, module.bias)], torch.empty(0)
    )


def layer_groups(probe: LayerProbe) -> tuple[ScaleGroup, ...]:
    """The layer's groups in the order in which data meets them, each with its smooth layer or the reason."""
    return tuple(smoothed(probe, group) for group in input_groups(probe))


def input_groups(probe: LayerProbe) -> list[ScaleGroup]:
    """Linears that read the same numbers, and the small matrices that read them too."""
    block = probe.block
    readers: dict[tuple[bytes, ...], list[str]] = {}
    for name in probe.trace.order:
        if block is None or not name.startswith(block.path + "."):
            readers.setdefault(tuple(probe.trace.inputs[name]), []).append(name)
    groups: list[ScaleGroup] = []
    for names in readers.values():
        linears = [n for n in names if is_linear(probe.modules[n]) and probe.rows(n) >= LEAST_ROWS]
        sparse = block if block is not None and block.path in names else None
        balance = (*(sparse.templates(sparse.up) if sparse else ()), *linears)
        if not balance:
            continue
        columns = probe.columns(ScaleGroup(balance_layers=balance))
        others = [n for n in names if n not in linears and is_small_reader(probe.modules[n], columns)]
        observed = (*others, *linears, sparse.path)[0] if sparse else None
        groups.append(ScaleGroup(balance_layers=balance, compensated=tuple(others), observed=observed))
        if sparse:
            down, expert = sparse.templates([sparse.down]), f"{sparse.path}.{EXPERT}"
            groups.append(ScaleGroup(balance_layers=down, expert=expert))
    return groups


def is_small_reader(module: nn.Module, columns: int) -> bool:
    """Whether the module has a matrix of its own for this input."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[1] == columns


def smoothed(probe: LayerProbe, group: ScaleGroup) -> ScaleGroup:
    for candidate in candidates(probe, group):
        if probe.holds([candidate]):
            return candidate
    return group.model_copy(update={"unscaled": UNSCALED, "compensated": ()})


def candidates(probe: LayerProbe, group: ScaleGroup) -> Iterator[ScaleGroup]:
    """The group with every smooth layer that it could have, the likely ones first."""
    columns = probe.columns(group)
    for name in norms_before(probe, group):
        rows = probe.rows(name)
        if columns % rows == 0:
            pattern = "all" if rows == columns else "tiled"
            for kind in ("norm", "offset norm"):
                fields = {"smooth_layer": name, "smooth_kind": kind, "smooth_rows": pattern}
                yield group.model_copy(update=fields)
    for name in linears_before(probe, group):
        for chosen in row_patterns(probe.heads.settings, probe.rows(name), columns):
            yield group.model_copy(update={"smooth_layer": name, **chosen})


def position(probe: LayerProbe, group: ScaleGroup) -> int:
    block = probe.block
    names = [block.path if block and EXPERT in n else n for n in (*group.balance_layers, *group.compensated)]
    return min(probe.trace.order.index(name) for name in names)


def norms_before(probe: LayerProbe, group: ScaleGroup) -> list[str]:
    """Modules with a vector of factors that run before the group: first those that give its input."""
    if group.expert is not None:
        return []
    read = probe.trace.inputs[group.source][0]
    names = [
        name
        for name in probe.trace.order[: position(probe, group)]
        if name in probe.trace.outputs and is_norm(probe.modules[name])
    ]
    producing = [name for name in names if read in probe.trace.outputs[name]]
    return producing + [name for name in reversed(names) if name not in producing]


def is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def linears_before(probe: LayerProbe, group: ScaleGroup) -> list[str]:
    """Linears that run before the group, those of its own module first, then the nearest."""
    if group.expert is not None and probe.block is not None:
        return list(probe.block.templates(probe.block.up[::-1]))
    block = probe.block
    names = [
        name
        for name in reversed(probe.trace.order[: position(probe, group)])
        if is_linear(probe.modules[name]) and not (block and name.startswith(block.path + "."))
    ]
    parent = group.balance_layers[0].rpartition(".")[0]
    return sorted(names, key=lambda name: name.rpartition(".")[0] != parent)[:NEAREST]


def row_patterns(settings: Mapping[str, object], rows: int, columns: int) -> Iterator[dict[str, object]]:
    """Fields of a ScaleGroup for every choice of a linear's rows that may feed the columns."""
    if rows == columns:
        yield {}
    if rows > columns:
        yield {"smooth_rows": "last"}
        if rows % columns == 0:
            for number in range(rows // columns - 1):
                yield {"smooth_rows": "block", "block": (number, rows // columns)}
    for key, shared_key in HEAD_KEYS:
        heads, shared = settings.get(key), settings.get(shared_key)
        if not isinstance(heads, int) or columns % heads:
            continue
        keys: dict[str, object] = {"heads": key}
        if rows > columns and rows % heads == 0:
            yield {**keys, "smooth_rows": "last of each head"}
            yield {**keys, "smooth_rows": "first of each head"}
        if isinstance(shared, int) and 0 < shared < heads and heads % shared == 0:
            yield from shared_patterns(
                rows, shared * (columns // heads), {**keys, "shared_heads": shared_key}
            )


def shared_patterns(rows: int, width: int, keys: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """As `row_patterns` where `width` rows are repeated by heads."""
    if rows == width:
        yield {**keys, "smooth_rows": "all", "repeats_heads": True}
    elif rows > width:
        for pattern in ("last", "last of each head", "first of each head"):
            yield {**keys, "smooth_rows": pattern, "repeats_heads": True}
