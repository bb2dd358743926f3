"""Reads a model's config and the headers of its weights, and refuses unsafe models. No weight is read.

Which files count is decided by `app.core.sources.file_choice`. Code that lies beside them is never run,
downloaded or copied; a model whose type transformers does not know itself is refused for it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen
from app.core.sources.file_choice import (
    GGUF,
    INDEX,
    FileChoice,
    choose_files,
    choose_gguf,
    gguf_file,
    is_code,
)
from app.core.sources.gguf_header import read_gguf_header
from app.core.sources.gguf_model import gguf_model
from app.core.sources.git_lfs import MAX_POINTER_BYTES, refuse_pointer
from app.core.sources.json_file import ReadableFiles, read_json, refused
from app.core.sources.safetensors_header import TensorHeader, header_length, parse_header

MAX_JSON_BYTES = 4 * 1024**2
MAX_ALL_HEADERS = 200 * 1024**2
FIRST_READ = 64 * 1024
READERS = 8  # files that are read at a time: over a network each costs a round trip


class SourceFormat(Frozen):
    """The form in which a model came, with the number of tensors of each type."""

    format: Literal["safetensors", "gguf"]
    types: dict[str, int]


class ModelHeaders(Frozen):
    """A model without its weights.

    `config` has no keys that name code. `files` are the sizes of the files that make up the model, `code` is
    what of the folder would be run with trust_remote_code, and `notes` are for the reader of the job.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    files: dict[str, int]
    side_files: tuple[str, ...]
    code: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def source(self) -> SourceFormat:
        types = Counter(tensor.stored_as for tensor in self.tensors.values())
        is_gguf = self.gguf is not None
        return SourceFormat(format="gguf" if is_gguf else "safetensors", types=dict(types.most_common()))

    @property
    def gguf(self) -> str | None:
        """The one file that holds the model, if it is GGUF."""
        return next((path for path in self.files if path.lower().endswith(GGUF)), None)


def inspect_model(files: ReadableFiles) -> ModelHeaders:
    """The model's config and tensors.

    Raises ModelRefused for unsafe, missing, damaged and contradicting files.
    """
    sizes = files.list()
    gguf = gguf_file(files.name, sizes)
    if gguf is not None:
        return inspect_gguf(files, gguf)
    if "config.json" not in sizes:
        raise refused(
            "model_config_missing",
            f"{files.name} holds no config.json",
            "give its base model as `model`, and this as `adapter`"
            if "adapter_config.json" in sizes
            else "give the folder or repository of a transformers model",
        )
    config = read_json(files, "config.json", sizes, MAX_JSON_BYTES)
    refuse_tokenizer_code(files, sizes)
    choice = choose_files(files)
    refuse_other_weights(config.value, choice)
    refuse_pointers(files, choice)
    tensors = merge(read_headers(files, choice.weights, sizes))
    check_index(choice.index, tensors)
    code = tuple(f"{key} in config.json" for key in config.code)
    return ModelHeaders(
        config=config.value,
        tensors=tensors,
        files=choice.files,
        side_files=choice.side_files,
        code=(*code, *sorted(filter(is_code, sizes))),
        notes=(*code_note(code), *choice.notes),
    )


def inspect_gguf(files: ReadableFiles, path: str) -> ModelHeaders:
    choice = choose_gguf(files, path)
    refuse_tokenizer_code(files, choice.files)
    refuse_pointers(files, choice)
    config, tensors = gguf_model(path, read_gguf_header(files, path))
    headers = ModelHeaders(
        config=config,
        tensors=tensors,
        files=choice.files,
        side_files=choice.side_files,
        code=tuple(sorted(filter(is_code, files.list()))),
        notes=choice.notes,
    )
    types = ", ".join(f"{count} of {name}" for name, count in headers.source.types.items())
    note = (
        f"read from {path} (GGUF; tensors: {types}) as {config['dtype']}: what was lost when that file was "
        "made is lost in the original of this job, and in none of its figures"
    )
    return headers.model_copy(update={"notes": (note, *choice.notes)})


def refuse_pointers(files: ReadableFiles, choice: FileChoice) -> None:
    """Refuse side files that are only git-lfs pointers. Weights are met when their headers are read."""
    small = [path for path in choice.side_files if choice.files[path] < MAX_POINTER_BYTES]
    with ThreadPoolExecutor(READERS) as pool:
        contents = pool.map(lambda path: files.read(path, 0, choice.files[path]), small)
        for path, content in zip(small, contents, strict=True):
            refuse_pointer(path, content)


def code_note(code: tuple[str, ...]) -> tuple[str, ...]:
    if not code:
        return ()
    return (f"the code that the model names ({', '.join(code)}) is neither run nor copied",)


def refuse_other_weights(config: dict[str, Any], choice: FileChoice) -> None:
    """Refuse a config that sends transformers to other files than were chosen."""
    named = config.get("transformers_weights")
    if named is not None and named not in choice.files:
        raise refused(
            "model_weights_ambiguous",
            f"transformers_weights in config.json names {str(named)[:200]!r}, where other loaders open "
            f"{', '.join(choice.weights[:3])}",
            "remove transformers_weights from config.json, or the weights that do not count",
        )


def refuse_tokenizer_code(files: ReadableFiles, sizes: Mapping[str, int]) -> None:
    """Refuse a tokenizer that only code of the model's own could open."""
    if "tokenizer_config.json" not in sizes:
        return
    settings = read_json(files, "tokenizer_config.json", sizes, MAX_JSON_BYTES)
    if "auto_map" in settings.code and "tokenizer.json" not in sizes:
        raise refused(
            "model_remote_code",
            "tokenizer_config.json names code (auto_map), and no tokenizer.json opens without it",
            "add a tokenizer.json; code of a model is never run",
        )


def with_code(refusal: ModelRefused, code: tuple[str, ...]) -> ModelRefused:
    """The refusal of an architecture, which says so if the model brings code for it."""
    if refusal.code != "architecture_unsupported" or not code:
        return refusal
    return refused(
        "model_remote_code",
        f"{refusal.message}, and code of the model's own ({', '.join(code[:3])}) is never run",
        refusal.remedy,
    )


def model_digest(hashes: Mapping[str, str]) -> str:
    """The model's identity, from the SHA-256 of each of its files."""
    lines = "".join(f"{path}\0{sha256}\n" for path, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def merged_digest(model: str, adapter: str | None) -> str:
    """The identity of a model's weights with an adapter merged into them: the model's own without one."""
    return model if adapter is None else hashlib.sha256(f"{model}\0{adapter}".encode()).hexdigest()


def read_headers(
    files: ReadableFiles, weights: Sequence[str], sizes: Mapping[str, int]
) -> dict[str, dict[str, TensorHeader]]:
    """The tensors of each file."""
    with ThreadPoolExecutor(READERS) as pool:
        firsts = list(pool.map(lambda path: files.read(path, 0, min(FIRST_READ, sizes[path])), weights))
        lengths = [
            header_length(path, first, sizes[path]) for path, first in zip(weights, firsts, strict=True)
        ]
        if sum(lengths) > MAX_ALL_HEADERS:
            raise refused(
                "model_header_invalid",
                f"the headers claim {sum(lengths)} bytes together; at most {MAX_ALL_HEADERS} are allowed",
                "export the model again",
            )

        def whole_header(path: str, first: bytes, length: int) -> bytes:
            if 8 + length <= len(first):
                return first[8 : 8 + length]
            return first[8:] + files.read(path, len(first), 8 + length - len(first))

        headers = list(pool.map(whole_header, weights, firsts, lengths))
    return {
        path: parse_header(path, header, sizes[path]) for path, header in zip(weights, headers, strict=True)
    }


def merge(by_file: Mapping[str, Mapping[str, TensorHeader]]) -> dict[str, TensorHeader]:
    """All tensors under one roof. Raises ModelRefused if a name occurs in two files."""
    tensors: dict[str, TensorHeader] = {}
    for path, entries in by_file.items():
        for name, tensor in entries.items():
            if name in tensors:
                raise refused("model_tensor_twice", f"tensor {name} is in {tensors[name].file} and in {path}",
                              "remove the stale file")  # fmt: skip
            tensors[name] = tensor
    if not tensors:
        raise refused(
            "model_weights_missing", "the safetensors files hold no tensors", "export the model again"
        )
    return tensors


def check_index(weight_map: Mapping[str, str] | None, tensors: Mapping[str, TensorHeader]) -> None:
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise refused("model_index_invalid", f"{INDEX} promises tensor {name} in {file}, which lacks it",
                          "download the model again: shards and index do not belong together")  # fmt: skip
