"""A model family fitted to one model: of which kind each layer is, and where its tensors lie in the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, cached_property

from app.core.errors import ModelRefused
from app.core.formats.targets import FUSED_NAMES
from app.core.planning.family import (
    EXPERT,
    EXPERT_NUMBER,
    LAYER_OUTPUT,
    Experts,
    Family,
    LayerKind,
    ScaleGroup,
    each_expert,
    text_settings,
)
from app.core.planning.family_choice import family_of, headers_family
from app.core.planning.fused_experts import MAX_EXPERTS, split_fused_experts
from app.core.records.specs import Frozen
from app.core.sources.safetensors_header import TensorHeader

__all__ = ["LAYER_OUTPUT", "Architecture", "Experts", "HeadStep", "ScaleGroup", "architecture_of"]

LAYER_NUMBER = re.compile(
    r"(?P<stack>(?:[^.]+\.)*?)(?P<last>[^.\d]+)\.(?P<number>\d+)\.(?P<local>.+)", re.ASCII
)
# Stacks of layers that are not the decoder's.
OTHER_STACKS = re.compile(r"(^|[._])(vision|visual|image|video|audio|speech|vit|mtp|encoder)", re.ASCII)
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # of config.json


class HeadStep(Frozen):
    """The head as one more layer behind the others, where a recipe quantizes it."""

    number: int
    linear: str  # in checkpoints


class Architecture(Family):
    """A family with what the headers and config.json of one model say; `at` gives one layer's groups.

    `stored_layers` is the name in the files of the module list, `stored_heads` those that the head may have
    there. `to_find` is why the groups are those of another
    model's function or of none, and are to be found by tracing when the job starts.
    """

    stored_layers: str
    stored_heads: tuple[str, ...] = ()
    num_experts: int = 0
    fused_experts: bool = False  # in the files, those of a layer in one tensor
    layer_kinds: tuple[int, ...] = ()  # of the layers in the files; of others the first
    to_find: str | None = None
    head_step: HeadStep | None = None
    groups: tuple[ScaleGroup, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()  # linears that servers make one matrix of
    experts: Experts | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that are quantized, in the order in which data meets them."""
        return tuple(name for group in self.groups for name in group.balance_layers)

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the groups in steps, each of which reads outputs of earlier ones; experts are one."""
        steps: list[tuple[int, ...]] = []
        for index, group in enumerate(self.groups):
            if group.expert is not None and self.groups[index - 1].expert is not None:
                steps[-1] += (index,)
            else:
                steps.append((index,))
        return tuple(steps)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The possible names of the head's weights in checkpoints; the first that exists counts."""
        shared = (self.checkpoint_name(self.embedding + ".weight"),) if self.tied else ()
        return (*(f"{module}.weight" for module in self.head_modules), *shared)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the head, in transformers and in checkpoints."""
        return tuple(
            dict.fromkeys((self.head, self.checkpoint_name(self.head + ".")[:-1], *self.stored_heads))
        )

    def layer_prefix(self, layer: int) -> str:
        """Of the layer's tensors in checkpoints; of the head's step, of the head's own name."""
        if self.is_head(layer):
            assert self.head_step is not None
            return "".join(self.head_step.linear.rpartition(".")[:2])
        return f"{self.stored_layers}.{layer}."

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor or module of checkpoints belongs to; the head's step for the head."""
        if self.head_step is not None and name.removesuffix(".weight") == self.head_step.linear:
            return self.head_step.number
        stack = self.stored_layers + "."
        number = name.removeprefix(stack).partition(".")[0]
        return int(number) if name.startswith(stack) and number.isdecimal() else None

    def is_head(self, layer: int) -> bool:
        """Whether this is the step behind the layers, in which the head is quantized."""
        return self.head_step is not None and layer == self.head_step.number

    def kind(self, layer: int) -> LayerKind:
        if self.head_step is not None and self.is_head(layer):
            return head_kind(self.head_step.linear.rpartition(".")[2])
        return self.kinds[self.layer_kinds[layer] if layer < len(self.layer_kinds) else 0]

    def at(self, layer: int) -> Architecture:
        """The architecture with the groups of this layer."""
        kind = self.kind(layer)
        groups, fused = expanded(kind, self.num_experts if kind.experts is not None else 0)
        return self.model_copy(update={"groups": groups, "fused": fused, "experts": kind.experts})

    def expert_linears(self, layer: int) -> tuple[str, ...]:
        """The linears of a layer's experts, by name in it."""
        marked = tuple(name for name in self.kind(layer).linears if EXPERT in name)
        return each_expert(marked, self.num_experts)

    def of_language(self, name: str) -> bool:
        """Whether a name of transformers is the language model's, not that of a tower for images or sound."""
        return name.startswith(self.roots[0]) or f"{name}.".startswith(f"{self.head}.")

    def has_experts(self, layer: int) -> bool:
        return self.kind(layer).experts is not None

    def fused_set(self, linear: str) -> tuple[str, ...]:
        """The linears of a layer that must share one scheme with this one, itself included."""
        return next((names for names in self.fused if linear in names), (linear,))

    def stored_name(self, name: str) -> str:
        """The name in checkpoints of a parameter or module within a layer, or of one outside of them."""
        for inside, stored in self.stored_names:
            if name.startswith(inside):
                return stored + name.removeprefix(inside)
        return name

    def checkpoint_name(self, name: str) -> str:
        """As `stored_name` for a full name of transformers."""
        layers = self.layers + "."
        if name.startswith(layers):
            number, _, local = name.removeprefix(layers).partition(".")
            return f"{self.stored_layers}.{number}.{self.stored_name(local)}"
        named = self.stored_name(name)
        inside, stored = self.roots
        if named == name and inside != stored and name.startswith(inside):
            return stored + name.removeprefix(inside)
        return named

    def loaded_name(self, name: str) -> str | None:
        """What transformers calls a module of a layer, where the files have another name for it."""
        stack = self.stored_layers + "."
        number, _, local = name.removeprefix(stack).partition(".")
        loaded = f"{self.layers}.{number}.{self.module_name(local)}"
        return loaded if name.startswith(stack) and loaded != name else None

    @cached_property
    def roots(self) -> tuple[str, str]:
        """Prefixes of what lies beside the layers, in transformers and in checkpoints."""
        inside, stored = (path.rpartition(".")[0] for path in (self.layers, self.stored_layers))
        return inside + ".", stored + "." if stored else ""

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The tensors of checkpoints that together are one of transformers, given by its full name."""
        number, _, local = name.removeprefix(self.layers + ".").partition(".")
        if not name.startswith(self.layers + ".") or not number.isdecimal():
            return ()
        parts = dict(self.kind(int(number)).joined).get(local, ())
        return tuple(self.layer_prefix(int(number)) + stored for stored in parts)

    def module_name(self, name: str) -> str:
        """The name in transformers of a module within a layer of a checkpoint."""
        for inside, stored in self.stored_names:
            whole = f"{name}.weight"  # a pair may name the module itself, or its weight
            if whole.startswith(stored):
                return (inside + whole.removeprefix(stored)).removesuffix(".weight")
        return name


@cache
def head_kind(name: str) -> LayerKind:
    """The head by itself. The norm before it is no part of any layer, and absorbs no scales."""
    group = ScaleGroup(balance_layers=(name,), unscaled="no scales: it is behind the layers")
    return LayerKind(groups=(group,))


@cache
def expanded(kind: LayerKind, experts: int) -> tuple[tuple[ScaleGroup, ...], tuple[tuple[str, ...], ...]]:
    """The groups of a layer, and its sets of linears that servers make one matrix of.

    Such are linears of one module that read one input, by their names where those say it, and all experts of
    a layer.
    """
    groups = tuple(group for template in kind.groups for group in template.expanded(experts))
    together: dict[str, list[str]] = {}
    for number, template in enumerate(kind.groups):
        for name in template.balance_layers:
            parent, _, last = name.rpartition(".")
            whole = f"{number} {parent} {FUSED_NAMES.get(last)}"
            together.setdefault(name.partition(f".{EXPERT}")[0] if EXPERT in name else whole, []).append(name)
    sets = (each_expert(tuple(names), experts) for names in together.values())
    return groups, tuple(names for names in sets if len(names) > 1)


def architecture_of(
    config: Mapping[str, object], tensors: Mapping[str, TensorHeader], family: Family | None = None
) -> Architecture:
    """The architecture of a model by its config.json and headers; `family` if it was found by tracing.

    Raises ModelRefused for one that can't be quantized.
    """
    to_find = None
    if family is None:
        family, to_find = family_of(config, tensors)
        if to_find is not None and not fits(family, tensors):
            family = headers_family(family.model_type, [family.class_name], config, tensors) or family
    stored_layers = stored_stack(family, tensors)
    stored = tensors
    tensors = split_fused_experts(stored, stored_layers, family.kinds)
    layers = layer_modules(stored_layers, tensors)
    tied = config.get("tie_word_embeddings")  # that of a wrapper counts, not that of its text part
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    last = f".{family.head.rpartition('.')[2]}"
    return Architecture.model_validate(
        {
            **{key: getattr(family, key) for key in Family.model_fields},
            "tied": family.tied if tied is None else bool(tied),
            "stored_layers": stored_layers,
            "stored_heads": tuple(name for name in modules if name.endswith(last)),
            "num_experts": claimed_experts(family, config) or count_experts(layers, stored_layers, tensors),
            "fused_experts": any(stored[name].encoding is None for name in stored.keys() - tensors.keys()),
            "layer_kinds": tuple(kinds_of_layers(family, layers)),
            "to_find": to_find,
        }
    )


def fits(family: Family, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether each layer of the files has the linears of one of the family's kinds."""
    stored_layers = stored_stack(family, tensors)
    layers = layer_modules(stored_layers, split_fused_experts(tensors, stored_layers, family.kinds))
    kinds = [set(kind.linears) for kind in family.kinds]
    every = set().union(*kinds)
    return all(names & every in kinds for names in layers.values())


def stored_stack(family: Family, tensors: Mapping[str, TensorHeader]) -> str:
    """The name in the files of the module list of the decoder layers."""
    linears = {name for kind in family.kinds for name in kind.linears}
    stacks: Counter[str] = Counter()
    for name in tensors:
        if name.startswith(family.layers + "."):
            return family.layers
        match = LAYER_NUMBER.fullmatch(name)
        if match and EXPERT_NUMBER.sub(EXPERT, match["local"]).rpartition(".")[0] in linears:
            stacks[match["stack"] + match["last"]] += 1
    return max(stacks, key=lambda stack: likeness(stack, stacks[stack]), default=family.layers)


def likeness(stack: str, linears: int) -> tuple[bool, bool, int]:
    """How much a module list with so many of the family's linears looks like its decoder, for ordering."""
    return "language" in stack, not OTHER_STACKS.search(stack), linears


def layer_modules(stored_layers: str, tensors: Mapping[str, TensorHeader]) -> dict[int, set[str]]:
    """The modules with tensors in each layer, all experts under one name."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if name.startswith(stored_layers + "."):
            number, _, local = name.removeprefix(stored_layers + ".").partition(".")
            if number.isdecimal() and len(number) < 7:
                module = EXPERT_NUMBER.sub(EXPERT, local).rpartition(".")[0]
                layers.setdefault(int(number), set()).add(module)
    return layers


def kinds_of_layers(family: Family, layers: Mapping[int, set[str]]) -> Iterator[int]:
    """The number of each layer's kind: the one whose linears it has, else the one with most of them."""
    linears = [set(kind.linears) for kind in family.kinds]
    every = set().union(*linears)
    by_names: dict[frozenset[str], int] = {}
    for number in range(max(layers, default=-1) + 1):
        names = frozenset(layers.get(number, set()) & every)
        if names not in by_names:
            by_names[names] = min(range(len(linears)), key=lambda kind: len(linears[kind] ^ names))
        yield by_names[names]


def claimed_experts(family: Family, config: Mapping[str, object]) -> int | None:
    """How many experts config.json says that a block has. Raises ModelRefused for an impossible number."""
    settings = text_settings(config)
    key = next((key for key in EXPERT_COUNTS if settings.get(key) is not None), None)
    if key is None or all(kind.experts is None for kind in family.kinds):
        return None
    count = settings[key]
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MAX_EXPERTS:
        raise ModelRefused(
            f"config.json: {key} is {str(count)[:100]!r}, expected a number of experts up to {MAX_EXPERTS}",
            code="config_invalid", remedy="restore the model's original config.json", param="model",
        )  # fmt: skip
    return count


def count_experts(
    layers: Mapping[int, set[str]], stored_layers: str, tensors: Mapping[str, TensorHeader]
) -> int:
    """How many experts the files have, by the largest number."""
    sparse = next((n for n, names in layers.items() if any(EXPERT in name for name in names)), None)
    if sparse is None:
        return 0
    prefix = f"{stored_layers}.{sparse}."
    matches = (EXPERT_NUMBER.search(name) for name in tensors if name.startswith(prefix))
    return min(MAX_EXPERTS, 1 + max(int(match[0]) for match in matches if match and len(match[0]) < 7))
