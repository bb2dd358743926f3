"""Records that describe an architecture: groups of linears around the scales, and module names.

Names are those of checkpoints, relative to one decoder layer.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen

SmoothKind = Literal["norm", "offset norm", "linear"]
SmoothRows = Literal["all", "last", "last of each head"]
ConfigValue = str | int | float | bool | None

MAX_EXPERTS = 4096  # a larger count in config.json is refused
LAYER_OUTPUT = "output"
EXPERT = "{expert}"  # in a template's names: every expert's number


class Condition(Frozen):
    """Holds if a key of config.json has one of the values; a missing key is None."""

    key: str
    values: tuple[ConfigValue, ...]
    negated: bool = False

    def holds(self, config: dict[str, object]) -> bool:
        return (config.get(self.key) in self.values) is not self.negated


class ScaleGroup(Frozen):
    """Linears that read one input, and the layer before them that can absorb its scales.

    `smooth_layer` is divided by the scales along its output, the `balance_layers` are multiplied along
    their input, and so are the `compensated` ones, which read the same input but are never quantized
    (routers). Without a smooth layer the linears are quantized without scales, for the reason in `unscaled`.
    An "offset norm" multiplies by 1 + weight. With grouped-query attention v -> o shares one scale between
    the query heads of a key/value head (`repeats_heads`). Of a fused projection only some rows are divided
    (`smooth_rows`). If a group's output is added to the residual stream unchanged, `joins` names the
    module that reads the sum, or the layer's output.
    """

    balance_layers: tuple[str, ...]
    smooth_layer: str | None = None
    smooth_kind: SmoothKind = "linear"
    smooth_rows: SmoothRows = "all"
    repeats_heads: bool = False
    compensated: tuple[str, ...] = ()
    unscaled: str | None = None
    observed: str | None = None  # the module whose input is read; the first balance layer if None
    expert: str | None = None  # the expert that alone sees this input, and only the tokens routed to it
    joins: str | None = None
    only_if: Condition | None = None
    blocks: Literal["all", "dense", "experts"] = "all"

    @property
    def source(self) -> str:
        return self.observed or self.balance_layers[0]

    def expanded(self, experts: int) -> tuple[ScaleGroup, ...]:
        """The groups of a template: one per expert, or one with the linears of all of them."""
        if self.expert is None:
            return (self.model_copy(update={"balance_layers": each_expert(self.balance_layers, experts)}),)
        named = ("smooth_layer", "expert")
        return tuple(
            self.model_copy(
                update={
                    "balance_layers": tuple(n.replace(EXPERT, str(number)) for n in self.balance_layers),
                    **{key: str(getattr(self, key)).replace(EXPERT, str(number)) for key in named},
                }
            )
            for number in range(experts)
        )


class Experts(Frozen):
    """The experts of a sparse block, which transformers holds as fused tensors and checkpoints don't."""

    module: str  # of transformers, in the layer
    gate: str  # names of an expert's linears in checkpoints
    up: str
    down: str
    count_keys: tuple[str, ...]  # of config.json
    first_dense_key: str = ""  # number of layers at the start that have no experts
    dense_layers_key: str = ""  # list of layers that have none
    step_key: str = ""  # every n-th layer has them

    def fitted(self, config: dict[str, object]) -> dict[str, object]:
        """The fields of an Architecture for this config.json: number of experts, and layers without any."""
        count = next((config[key] for key in self.count_keys if config.get(key)), None)
        first, step = config.get(self.first_dense_key) or 0, config.get(self.step_key) or 1
        named = config.get(self.dense_layers_key) or []
        sound = isinstance(count, int) and 0 < count <= MAX_EXPERTS
        if not (sound and isinstance(first, int) and isinstance(step, int) and isinstance(named, list)):
            raise ModelRefused(
                f"config.json: {self.count_keys[0]} is {count!r}, or does not say which layers have experts",
                code="config_invalid", remedy="restore the model's original config.json", param="model",
            )  # fmt: skip
        return {
            "num_experts": count,
            "first_expert_layer": first,
            "expert_step": step,
            "dense_layers": tuple(number for number in named if isinstance(number, int)),
        }


class Architecture(Frozen):
    """One `model_type`: the names of its modules, and the groups of one layer in the order of data.

    `architecture_of` fits an entry of the table to a model, and `at` to one of its layers.
    """

    model_type: str
    class_name: str  # of transformers
    groups: tuple[ScaleGroup, ...]
    fused: tuple[tuple[str, ...], ...] = ()  # linears that servers fuse into one matrix
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final: tuple[str, ...] = ("model.norm",)  # between the last layer and the head, where they exist
    head: str = "lm_head"
    tied: bool = False  # the head's weights are the embedding's; in the table: where config.json is silent
    attention: Literal["sdpa", "eager"] = "sdpa"  # of transformers; some models have no fast one
    learned_positions: bool = False  # a table: it ends
    stored_names: tuple[tuple[str, str], ...] = ()  # prefix in transformers, prefix in checkpoints
    presumes: tuple[Condition, ...] = ()  # what the groups rest on
    experts: Experts | None = None
    num_experts: int = 0
    first_expert_layer: int = 0
    expert_step: int = 1
    dense_layers: tuple[int, ...] = ()

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
        weight = self.head + ".weight"
        shared = (self.embedding + ".weight",) if self.tied else ()
        return tuple(dict.fromkeys((weight, self.stored_name(weight), *shared)))

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def at(self, layer: int) -> Architecture:
        """The architecture with the groups of this layer."""
        return layer_architecture(self, self.has_experts(layer))

    def has_experts(self, layer: int) -> bool:
        if self.experts is None or layer < self.first_expert_layer or layer in self.dense_layers:
            return False
        return (layer + 1) % self.expert_step == 0

    def fused_set(self, linear: str) -> tuple[str, ...]:
        """The linears of a layer that must share one scheme with this one, itself included."""
        return next((names for names in self.fused if linear in names), (linear,))

    def stored_name(self, name: str) -> str:
        """The name in checkpoints of a parameter or module of transformers."""
        for inside, stored in self.stored_names:
            if name.startswith(inside):
                return stored + name.removeprefix(inside)
        return name

    def checkpoint_name(self, name: str) -> str:
        """As `stored_name` for a full name; in a decoder layer its local name is translated."""
        layers = self.layers + "."
        if not name.startswith(layers):
            return self.stored_name(name)
        number, _, local = name.removeprefix(layers).partition(".")
        return f"{layers}{number}.{self.stored_name(local)}"

    def module_name(self, name: str) -> str:
        """The name in transformers of a module of a checkpoint."""
        for inside, stored in self.stored_names:
            if name.startswith(stored):
                return inside + name.removeprefix(stored)
        return name


@cache
def layer_architecture(whole: Architecture, has_experts: bool) -> Architecture:
    """The groups and fused sets of the layers with experts, or of those without."""
    blocks = ("all", "experts" if has_experts else "dense")
    experts = whole.num_experts if has_experts else 0
    groups = [group for g in whole.groups if g.blocks in blocks for group in g.expanded(experts)]
    linears = {name for group in groups for name in group.balance_layers}
    sets = (tuple(n for n in each_expert(names, experts) if n in linears) for names in whole.fused)
    return whole.model_copy(
        update={"groups": tuple(groups), "fused": tuple(names for names in sets if names)}
    )


def each_expert(names: tuple[str, ...], experts: int) -> tuple[str, ...]:
    """The names with every expert's number in place of the template's mark."""
    plain = tuple(name for name in names if EXPERT not in name)
    marked = [name for name in names if EXPERT in name]
    return plain + tuple(n.replace(EXPERT, str(number)) for number in range(experts) for n in marked)
