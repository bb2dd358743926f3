"""A model with a LoRA adapter merged into it, as headers: values are computed while they are read.

Everyone behind `inspect_merged` sees a model of plain weights, as with models that were quantized before
(`quantized_model.py`): the plan, the estimate, the engine, and the original of all figures. Every tensor of
the adapter is used, or the job is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen
from app.core.sources.adapter_config import (
    AGAIN,
    CONFIG,
    MERGE,
    LoraConfig,
    about_adapter,
    adapter_refused,
    read_config,
)
from app.core.sources.file_choice import PICKLES
from app.core.sources.json_file import ReadableFiles
from app.core.sources.model_headers import ModelHeaders, read_headers
from app.core.sources.quantized_model import inspect_original
from app.core.sources.safetensors_header import MergedValues, TensorHeader

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The module's name, and which of its factors; those of embeddings lie the other way round.
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<table>[AB]))")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
FLOATS = ("F32", "F16", "BF16")
IN_LAYER = re.compile(r"\.\d+\.", re.ASCII)
HEADS = ("lm_head", "embed_out", "output")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Adapter(Frozen):
    """An adapter without its weights: `tensors` by the names that follow `base_model.model.`."""

    name: str
    config: LoraConfig
    tensors: dict[str, TensorHeader]
    has_tokenizer: bool


def inspect_merged(files: ReadableFiles, adapter: ReadableFiles | None) -> ModelHeaders:
    """The model that a job starts from, with the adapter merged into it if there is one.

    Raises ModelRefused as `inspect_original` does, and for an adapter that can't be merged.
    """
    headers = inspect_original(files)
    return headers if adapter is None else merged_headers(headers, files.name, read_adapter(adapter))


def adapter_files(files: ReadableFiles) -> dict[str, int]:
    """The files that make up an adapter which was read before, with their sizes."""
    sizes = files.list()
    return {path: sizes[path] for path in (CONFIG, WEIGHTS)}


def read_adapter(files: ReadableFiles) -> Adapter:
    """Raises ModelRefused for missing, damaged and unclear files."""
    with about_adapter():
        config, sizes = read_config(files), files.list()
        if WEIGHTS not in sizes:
            pickle = next((path for path in sizes if path.endswith(PICKLES)), None)
            instead = f", only {pickle}, which can run code" if pickle else ""
            raise adapter_refused(
                "adapter_invalid",
                f"{files.name} holds no {WEIGHTS}{instead}",
                AGAIN,
            )
        stored = read_headers(files, [WEIGHTS], sizes)[WEIGHTS]
        other = next((name for name in stored if not name.startswith(PREFIX)), None)
        if other is not None or not stored:
            raise unusable(f"tensor {other}" if other else f"{WEIGHTS}, which holds no tensors,")
        return Adapter(
            name=files.name,
            config=config,
            tensors={name.removeprefix(PREFIX): tensor for name, tensor in stored.items()},
            has_tokenizer=any(path in sizes for path in TOKENIZERS),
        )


def merged_headers(headers: ModelHeaders, model: str, adapter: Adapter) -> ModelHeaders:
    """The model's headers with the adapter's changes; `model` is its name, for the note on another one."""
    changes = AdapterChanges(headers, adapter)
    changed = changes.all()
    refuse_tied(headers, changed)
    notes = (*merge_notes(adapter, changed), *other_model(adapter.config.base_model_name_or_path, model))
    return headers.model_copy(
        update={"tensors": {**headers.tensors, **changed}, "notes": (*headers.notes, *notes)}
    )


class AdapterChanges:
    """What the tensors of an adapter make of those of a model."""

    def __init__(self, headers: ModelHeaders, adapter: Adapter) -> None:
        self.headers, self.adapter = headers, adapter
        self.factors: dict[str, dict[str, TensorHeader]] = defaultdict(dict)  # of each module
        self.magnitudes: dict[str, TensorHeader] = {}
        self.whole: dict[str, TensorHeader] = {}
        for name, tensor in adapter.tensors.items():
            if tensor.dtype not in FLOATS:
                raise unusable(f"tensor {name} of {tensor.dtype}")
            if factor := FACTOR.fullmatch(name):
                kind = factor["linear"] or f"embedding {factor['table']}"
                self.factors[factor["module"]][kind] = tensor
            elif magnitude := MAGNITUDE.fullmatch(name):
                self.magnitudes[magnitude["module"]] = tensor
            elif "lora_" in name or "token_adapter" in name:
                raise unusable(f"tensor {name}")
            else:
                self.whole[name.replace(".base_layer.", ".")] = tensor

    def all(self) -> dict[str, TensorHeader]:
        """Every changed tensor of the model."""
        changed = {name: self.replaced(name, tensor) for name, tensor in self.whole.items()}
        return {**changed, **self.updates()}

    def updates(self) -> dict[str, TensorHeader]:
        """Of each module with factors, by the name of its weight."""
        config = self.adapter.config
        if set(self.magnitudes) != (set(self.factors) if config.use_dora else set()):
            says = f"use_dora {str(config.use_dora).lower()}"
            raise unusable(f"{says} with {len(self.magnitudes)} magnitudes for {len(self.factors)} modules")
        return {f"{module}.weight": self.updated(module, kinds) for module, kinds in self.factors.items()}

    def updated(self, module: str, kinds: Mapping[str, TensorHeader]) -> TensorHeader:
        base, rank = self.base(f"{module}.weight"), self.adapter.config.rank(module)
        is_table = "embedding A" in kinds
        down, up = (kinds.get(f"embedding {factor}" if is_table else factor) for factor in "AB")
        if down is None or up is None or len(kinds) != 2:
            raise unusable(f"{module}, of which A and B are not both there,")
        # Rows of the update, and its columns: B A, and of embeddings its transpose.
        expected = (rank, base.shape[1 - is_table]), (base.shape[is_table], rank)
        if (down.shape, up.shape) != expected:
            raise mismatch(
                f"{module}: A {list(down.shape)} and B {list(up.shape)} do not fit the model's weight "
                f"{list(base.shape)} at rank {rank}"
            )
        magnitude = self.magnitudes.get(module)
        if magnitude is not None and (is_table or magnitude.shape != base.shape[:1]):
            raise unusable(f"the magnitudes of {module}, {list(magnitude.shape)},")
        scale = self.adapter.config.scale(module)
        whole = self.whole.get(f"{module}.weight")  # what peft saves beside the factors of embeddings
        return merged(
            MergedValues(
                base=base, whole=whole, down=down, up=up, table=is_table, scale=scale, magnitude=magnitude
            )
        )

    def base(self, name: str) -> TensorHeader:
        """The matrix that an update is added to."""
        base = self.headers.tensors.get(name)
        if base is None:
            raise self.absent(name)
        if len(base.shape) != 2 or base.dtype not in FLOATS:
            raise unusable(f"an update of {name}, which is no matrix of floating-point numbers,")
        return base

    def absent(self, name: str) -> ModelRefused:
        shared = name.removesuffix(".weight").endswith(HEADS) and is_tied(self.headers.config)
        why = ": its head is the matrix of the embeddings" if shared else ""
        return mismatch(f"the adapter changes {name}, which the model's files do not hold{why}")

    def replaced(self, name: str, tensor: TensorHeader) -> TensorHeader:
        """A tensor that the adapter has whole: of `modules_to_save`, or a bias."""
        base = self.headers.tensors.get(name)
        if base is None:
            raise self.absent(name)
        if base.shape != tensor.shape:
            grown = base.shape[1:] == tensor.shape[1:]
            why = ": its training had another vocabulary" if grown else ""
            raise mismatch(
                f"the adapter brings {name} with the shape {list(tensor.shape)}, the model has "
                f"{list(base.shape)}{why}"
            )
        if base.dtype not in FLOATS or len(base.shape) > 2:
            raise unusable(f"{name}, which is no matrix or vector of floating-point numbers,")
        return merged(MergedValues(base=base, whole=tensor))


def merged(values: MergedValues) -> TensorHeader:
    base = values.base
    return TensorHeader(
        dtype=base.dtype, shape=base.shape, file=base.file, start=base.start, end=base.end,
        encoding="merged", merged=values,
    )  # fmt: skip


def refuse_tied(headers: ModelHeaders, changed: Mapping[str, TensorHeader]) -> None:
    """Raises ModelRefused for a change of embeddings that are also the head: of which is not said."""
    rows = vocabulary(headers.config)
    touched = next(
        (
            name
            for name, tensor in changed.items()
            if tensor.shape[:1] == (rows,) and not IN_LAYER.search(name)
        ),
        None,
    )
    has_head = any(name.rpartition(".")[0].endswith(HEADS) for name in headers.tensors)
    if touched is None or (has_head and not is_tied(headers.config)):
        return
    raise adapter_refused(
        "adapter_unsupported",
        f"the adapter changes {touched}, and the model has one matrix for embeddings and head: whether both "
        "change is not said",
        MERGE,
    )


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, and what it holds of its parts."""
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def vocabulary(config: Mapping[str, Any]) -> int | None:
    return next((each["vocab_size"] for each in text_configs(config) if "vocab_size" in each), None)


def is_tied(config: Mapping[str, Any]) -> bool:
    return any(each.get("tie_word_embeddings") is True for each in text_configs(config))


def merge_notes(adapter: Adapter, changed: Mapping[str, TensorHeader]) -> Iterator[str]:
    config = adapter.config
    values = [tensor.merged for tensor in changed.values() if tensor.merged is not None]
    updates = [each for each in values if each.down is not None]
    ranks = sorted({each.down.shape[0] for each in updates if each.down is not None})
    scales = sorted({each.scale for each in updates})
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    whole = len(values) - len(updates)
    replaces = f" and replaces {whole} tensors" if whole else ""
    yield (
        f"the adapter {adapter.name} ({kind}, rank {spread(ranks)}, scale {spread(scales)}) is merged into "
        f"{len(updates)} matrices{replaces} before all else: the original of this job is the merged model"
    )
    if adapter.has_tokenizer:
        yield "the tokenizer and chat template are the model's; those beside the adapter are not used"


def spread(values: list[int] | list[float]) -> str:
    texts = [f"{value:g}" for value in (values[0], values[-1])] if values else ["none"]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} to {texts[-1]}"


def other_model(trained_on: str | None, model: str) -> Iterator[str]:
    """A note if the adapter names another base model; of paths the last names are compared."""
    if trained_on and base_name(trained_on) != base_name(model):
        yield (
            f"adapter_config.json says that it was trained on {trained_on[:200]}, and the model is "
            f"{model[:200]}: names and shapes fit, whether the weights do is not known"
        )


def base_name(reference: str) -> str:
    path = reference.removeprefix("hf:").partition("@")[0].rstrip("/")
    return PurePosixPath(path).name.lower()


def unusable(what: str) -> ModelRefused:
    return adapter_refused("adapter_unsupported", f"{what} of the adapter can't be merged", MERGE)


def mismatch(message: str) -> ModelRefused:
    return adapter_refused(
        "adapter_mismatch", message, "give the adapter's own base model, in the form that it was trained on"
    )
