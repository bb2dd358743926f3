"""What is known of a model family: the kinds of its decoder layers, and the groups of linears in each.

Found by tracing (workers/discovery), and kept for known families as one JSON file each, so that a
job can be planned without torch. Names within a layer are those of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.core.records.specs import Frozen

SmoothKind = Literal["norm", "offset norm", "linear"]
SmoothRows = Literal["all", "block", "last", "last of each head", "first of each head", "tiled"]
Setting = str | bool | None

LAYER_OUTPUT = "output"
EXPERT = "{expert}"  # in names: every expert's number
EXPERT_NUMBER = re.compile(r"(?<=\bexperts\.)\d+(?=\.)", re.ASCII)
NUMBER = "number"  # in settings: any number
LEAST_ROWS = 16  # a matrix with fewer gives one number a head, or an expert


class ScaleGroup(Frozen):
    """Linears that read one input, and the layer before them that can absorb its scales.

    `smooth_layer` is divided by the scales along its output, the `balance_layers` are multiplied along
    their input, and so are the `compensated` ones, which read the same input but are never quantized
    (routers). Without a smooth layer the linears are quantized without scales, for the reason in `unscaled`.
    An "offset norm" multiplies by 1 + weight.

    Which of the smooth layer's rows are divided is `smooth_rows`: all; block k of n equal ones (`block`); as
    many as are needed from the end; of each head the last or the first; or a norm's weight, which is tiled
    over the heads. With `repeats_heads` the heads of `heads` share the scale of a head of `shared_heads`, as
    query heads do in grouped-query attention. Both are keys of config.json.

    If a group's output is added to the residual stream unchanged, `joins` names the module that reads the
    sum, or the layer's output.
    """

    balance_layers: tuple[str, ...]
    smooth_layer: str | None = None
    smooth_kind: SmoothKind = "linear"
    smooth_rows: SmoothRows = "all"
    block: tuple[int, int] | None = None
    repeats_heads: bool = False
    heads: str = "num_attention_heads"
    shared_heads: str = "num_key_value_heads"
    compensated: tuple[str, ...] = ()
    unscaled: str | None = None
    observed: str | None = None  # the module whose input is read; the first balance layer if None
    expert: str | None = None  # the expert that alone sees this input, and only the tokens routed to it
    joins: str | None = None

    @property
    def source(self) -> str:
        return self.observed or self.balance_layers[0]

    def expanded(self, experts: int) -> tuple[ScaleGroup, ...]:
        """The groups of a template: one per expert, or one with the linears of all of them."""
        if self.expert is None:
            return (self.model_copy(update={"balance_layers": each_expert(self.balance_layers, experts)}),)
        named = [key for key in ("smooth_layer", "expert") if getattr(self, key) is not None]
        return tuple(
            self.model_copy(
                update={
                    "balance_layers": tuple(n.replace(EXPERT, str(number)) for n in self.balance_layers),
                    **{key: str(getattr(self, key)).replace(EXPERT, str(number)) for key in named},
                }
            )
            for number in range(experts)
        )


def each_expert(names: tuple[str, ...], experts: int) -> tuple[str, ...]:
    """The names with every expert's number in place of the template's mark."""
    plain = tuple(name for name in names if EXPERT not in name)
    marked = [name for name in names if EXPERT in name]
    return plain + tuple(n.replace(EXPERT, str(number)) for number in range(experts) for n in marked)


class Experts(Frozen):
    """The experts of a sparse block, which transformers holds as fused tensors.

    `gate`, `up` and `down` name an expert's linears in checkpoints; `gate` is empty where an expert is
    down(activation(up(x))). A checkpoint may hold the fused tensors as they are, `fused_up` and `fused_down`
    (experts, rows, columns): with the matrices transposed, and with the rows of gate and up in turn.
    """

    module: str  # of transformers, in the layer
    gate: str
    up: str
    down: str
    fused_up: str = ""
    fused_down: str = ""
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False


class LayerKind(Frozen):
    """Decoder layers with the same linears; a layer of a checkpoint is of the kind whose linears it has.

    `joined` are tensors of transformers that checkpoints hold in parts, one below the other.
    """

    groups: tuple[ScaleGroup, ...]
    experts: Experts | None = None
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Templates of the linears, in the order in which data meets them."""
        return tuple(name for group in self.groups for name in group.balance_layers)


class Family(Frozen):
    """One `model_type`, under settings of config.json that its function depends on.

    `layers`, `embedding`, `final`, `head` and `trunk` are module paths of transformers' class. `trunk` is the
    module whose output the head reads. `stored_names` are pairs of prefixes: in transformers, in checkpoints;
    of full names outside of the layers, and of names within a layer.
    """

    model_type: str
    class_name: str  # of transformers
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final: tuple[str, ...] = ("model.norm",)  # between the last layer and the head, where they exist
    head: str = "lm_head"
    trunk: str = "model"
    tied: bool = False  # where config.json is silent: the head's weights are the embedding's
    attention: Literal["sdpa", "eager"] = "sdpa"  # of transformers; some models have no fast one
    learned_positions: bool = False  # a table: it ends
    stored_names: tuple[tuple[str, str], ...] = ()
    towers: tuple[
        str, ...
    ] = ()  # modules beside the decoder, in transformers, that checkpoints call otherwise
    settings: dict[str, Setting] = Field(
        default={}
    )  # of config.json, by dotted key, under which the kinds were found
    kinds: tuple[LayerKind, ...] = ()


TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder_config", "thinker_config")
SETTING_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("n_embd", "d_model", "model_dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
}
LAYER_LISTS = ("layers_block_type", "layer_types")
FAMILIES = Path(__file__).parent / "families"


def text_settings(config: Mapping[str, object]) -> dict[str, object]:
    """The settings of the language model, by the names that most models have for them.

    Wrappers of several kinds of input have them in a part of their own.
    """
    inner = next((config[key] for key in TEXT_PARTS if isinstance(config.get(key), dict)), None)
    if isinstance(inner, dict):
        outer = {key: value for key, value in config.items() if key not in TEXT_PARTS}
        return text_settings({**outer, **inner})
    settings = {**config}
    for name, others in SETTING_NAMES.items():
        value = next((config[key] for key in others if config.get(key) is not None), None)
        if value is not None and settings.get(name) is None:
            settings[name] = value
    of_layers = next((config[key] for key in LAYER_LISTS if isinstance(config.get(key), list)), None)
    if settings.get("num_hidden_layers") is None and isinstance(of_layers, list):
        settings["num_hidden_layers"] = len(of_layers)
    return settings


@cache
def known_family(model_type: str) -> Family | None:
    """The family of the checked-in file."""
    path = FAMILIES / f"{model_type}.json"
    if model_type not in known_types():
        return None
    return Family.model_validate_json(path.read_bytes())


@cache
def known_types() -> frozenset[str]:
    return frozenset(path.stem for path in FAMILIES.glob("*.json"))
