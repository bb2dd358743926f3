"""adapter_config.json of a LoRA adapter, as peft writes it: checked, and what it says of each module.

Read in peft 0.21.2 (`tuners/lora/config.py`, `layer.py`, `dora.py`, `utils/other.py`). A setting that is
neither understood nor without influence on merged weights is refused: none of a later version is passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import ModelRefused, field_fault, field_path
from app.core.records.patterns import check_pattern
from app.core.sources.json_file import ReadableFiles, parse_json

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_PATTERNS = 4096
AGAIN = "save the adapter again with peft's save_pretrained"
# What a model's files are refused with where they are damaged.
DAMAGED = ("model_config_invalid", "model_header_invalid", "model_file_too_large")
WRITTEN = "give the folder or repository that peft's save_pretrained has written"
MERGE = "merge it with peft's merge_and_unload(), save the model, and submit that"
# What says nothing of the merged weights: how it was trained, and for which modules, which its tensors show.
WITHOUT_INFLUENCE = frozenset(
    {
        "auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
        "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
        "megatron_core", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size",
        "runtime_config", "ensure_weight_tying", "bias", "velora_config",
    }
)  # fmt: skip
# Ways to start a training that leave the base model as it is; the others take what they start from out of it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that are met, with what they mean.
MEANINGS = {
    "target_parameters": "it changes parameters that are no linear, such as fused experts",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it changes single rows of the embeddings",
    "alora_invocation_tokens": "it is in force behind certain tokens alone",
    "lora_bias": "its factors have biases",
    "use_qalora": "its factors are made for groups of inputs",
    "fan_in_fan_out": "its matrices are stored transposed",
    "megatron_config": "it is of Megatron's own layers",
}

Value = TypeVar("Value", int, float)


class LoraConfig(BaseModel):
    """The settings that decide merged weights, and all others as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=2**20)
    lora_alpha: float = Field(allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = Field(default=None, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, float] | None = Field(default=None, max_length=MAX_PATTERNS)
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        return of_pattern(self.rank_pattern or {}, module, self.r)

    def scale(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        alpha, rank = of_pattern(self.alpha_pattern or {}, module, self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def of_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that matches the module's name or its end, as peft looks it up."""
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    first = next(matching, None)
    return default if first is None else patterns[first]


def read_config(files: ReadableFiles) -> LoraConfig:
    """Raises ModelRefused for an adapter that is not there, of another kind, or with settings of which it is
    not clear what they mean for merged weights."""
    size = files.list().get(CONFIG)
    if size is None:
        raise adapter_refused(
            "adapter_invalid",
            f"{files.name} holds no {CONFIG}",
            WRITTEN,
        )
    if size > MAX_CONFIG_BYTES:
        raise adapter_refused(
            "adapter_invalid",
            f"{CONFIG} has {size} bytes; at most {MAX_CONFIG_BYTES} are allowed",
            "repair it",
        )
    return checked_config(parse_json(CONFIG, files.read(CONFIG, 0, size)).value)


def checked_config(settings: dict[str, Any]) -> LoraConfig:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise unsupported(f"peft_type is {str(kind)[:100]!r}; LORA alone is merged here")
    try:
        config = LoraConfig.model_validate(settings)
        for pattern in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
            check_pattern(pattern)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise invalid(f"{field_path(first['loc'])}: {field_fault(first)}") from fault
    except ValueError as fault:
        raise invalid(str(fault)) from fault
    if config.rank_pattern and any(rank < 1 for rank in config.rank_pattern.values()):
        raise invalid("rank_pattern holds a rank below 1")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise unsupported(
            f"init_lora_weights is {str(config.init_lora_weights)[:100]!r}: its training may have started "
            "from other weights than the model's",
            "save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), or " + MERGE,
        )
    for name, value in (config.model_extra or {}).items():
        if value and name not in WITHOUT_INFLUENCE:
            meaning = MEANINGS.get(name, "what that means for merged weights is not known here")
            raise unsupported(f"{name[:100]} is {str(value)[:100]}: {meaning}")
    return config


@contextmanager
def about_adapter() -> Iterator[None]:
    """Refusals of a model's files are about the adapter's."""
    try:
        yield
    except ModelRefused as refusal:
        refusal.param = "adapter"
        if refusal.code in DAMAGED:
            refusal.code, refusal.remedy = "adapter_invalid", AGAIN
        if refusal.code == "model_not_found":
            refusal.remedy = WRITTEN
        raise


def adapter_refused(code: str, message: str, remedy: str) -> ModelRefused:
    return ModelRefused(message, code=code, remedy=remedy, param="adapter")


def invalid(why: str) -> ModelRefused:
    return adapter_refused("adapter_invalid", f"{CONFIG}: {why}", AGAIN)


def unsupported(why: str, remedy: str = MERGE) -> ModelRefused:
    return adapter_refused("adapter_unsupported", f"{CONFIG}: {why}", remedy)
