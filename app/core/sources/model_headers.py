"""What a model is, from config.json and safetensors headers alone, and refusals of unsafe files.

No weight is read. Which files belong to the model is decided here too, so that submission, download and
digest all speak of the same set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Protocol

from app.core.errors import ModelRefused
from app.core.sources.safetensors_header import TensorHeader, header_length, parse_header
from app.core.specs import Frozen

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SIDE_FILES = frozenset({"tokenizer.model", "vocab.txt", "merges.txt"})
SIDE_SUFFIXES = (".json", ".jinja")
MAX_JSON_BYTES = 4 * 1024**2
MAX_INDEX_BYTES = 64 * 1024**2
MAX_SIDE_BYTES = 200 * 1024**2
MAX_SHARDS = 1024
MAX_ALL_HEADERS = 200 * 1024**2
FIRST_READ = 64 * 1024


class ReadableFiles(Protocol):
    """The part of `ModelFiles` that reading headers needs."""

    name: str

    def list(self) -> dict[str, int]: ...

    def read(self, path: str, start: int, length: int) -> bytes: ...


class ModelHeaders(Frozen):
    """A model without its weights. `files` are the sizes of all files that make up the model."""

    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    files: dict[str, int]


def refused(code: str, message: str, remedy: str) -> ModelRefused:
    return ModelRefused(message, code=code, remedy=remedy, param="model")


def inspect_model(files: ReadableFiles) -> ModelHeaders:
    """The model's config and tensors.

    Raises ModelRefused for unsafe, missing, damaged and contradicting files.
    """
    sizes = files.list()
    refuse_code_files(files.name, sizes)
    if "config.json" not in sizes:
        raise refused(
            "model_config_missing",
            f"{files.name} holds no config.json",
            "give the folder or repository of a transformers model",
        )
    config = read_json(files, "config.json", sizes, MAX_JSON_BYTES)
    refuse_remote_code("config.json", config)
    if "tokenizer_config.json" in sizes:
        refuse_remote_code(
            "tokenizer_config.json", read_json(files, "tokenizer_config.json", sizes, MAX_JSON_BYTES)
        )
    weight_map = read_index(files, sizes)
    weights = weight_files(files.name, sizes, weight_map)
    tensors = merge(read_headers(files, weights, sizes))
    check_index(weight_map, tensors)
    return ModelHeaders(config=config, tensors=tensors, files=pick(sizes, weights))


def needed_files(files: ReadableFiles) -> dict[str, int]:
    """Sizes of the files that make up the model: weights, config, tokenizer, templates."""
    sizes = files.list()
    return pick(sizes, weight_files(files.name, sizes, read_index(files, sizes)))


def model_digest(hashes: Mapping[str, str]) -> str:
    """The model's identity, from the SHA-256 of each of its files."""
    lines = "".join(f"{path}\0{sha256}\n" for path, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def refuse_code_files(name: str, sizes: Mapping[str, int]) -> None:
    code = sorted(path for path in sizes if path.lower().endswith((".py", ".pyc", ".so")))
    if code:
        raise refused(
            "model_remote_code",
            f"{name} holds program files ({', '.join(code[:3])}); models with their own code are refused",
            "use a model of a supported architecture, without Python files",
        )


def refuse_remote_code(file: str, value: Any) -> None:
    """Refuse `auto_map` and a true `trust_remote_code` at any depth of a config."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict):
            for key in ("auto_map", "trust_remote_code"):
                if node.get(key):
                    raise refused(
                        "model_remote_code",
                        f"{file} names remote code ({key}); models with their own code are refused",
                        "use a model of a supported architecture, without auto_map",
                    )
            pending.extend(node.values())


def read_json(files: ReadableFiles, path: str, sizes: Mapping[str, int], limit: int) -> dict[str, Any]:
    if sizes[path] > limit:
        raise refused(
            "model_file_too_large",
            f"{path} has {sizes[path]} bytes; at most {limit} are allowed",
            "export the model again",
        )
    try:
        value = json.loads(files.read(path, 0, sizes[path]))
    except (ValueError, RecursionError) as fault:
        raise refused(
            "model_config_invalid", f"{path} is not valid JSON: {fault}", f"repair {path}"
        ) from fault
    if not isinstance(value, dict):
        raise refused("model_config_invalid", f"{path} is not a JSON object", f"repair {path}")
    return value


def read_index(files: ReadableFiles, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """Which file holds each tensor, from the index of a sharded model; None without one."""
    if INDEX not in sizes:
        return None
    weight_map = read_json(files, INDEX, sizes, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused("model_index_invalid", f"{INDEX} holds no weight_map", "export the model again")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise refused(
            "model_index_invalid", f"{INDEX}: a weight_map value is not a file name", f"repair {INDEX}"
        )
    return weight_map


def weight_files(name: str, sizes: Mapping[str, int], weight_map: Mapping[str, str] | None) -> list[str]:
    """The safetensors files that make up the model: those of the index, else those at the top."""
    if weight_map is not None:
        weights = sorted(set(weight_map.values()))
        for file in weights:
            if "/" in file or "\\" in file or not file.endswith(".safetensors"):
                raise refused("model_index_invalid", f"{INDEX} names {file!r}, which is not a file beside it",
                              f"repair {INDEX}")  # fmt: skip
            if file not in sizes:
                raise refused("model_shard_missing", f"{INDEX} names {file}, which does not exist",
                              "download the missing shard")  # fmt: skip
    elif SINGLE in sizes:
        weights = [SINGLE]
    else:
        weights = sorted(path for path in sizes if path.endswith(".safetensors") and "/" not in path)
    if not weights:
        refuse_without_safetensors(name, sizes)
    if len(weights) > MAX_SHARDS:
        raise refused("model_too_many_files", f"{len(weights)} shards; at most {MAX_SHARDS} are allowed",
                      "write fewer, larger shards")  # fmt: skip
    return weights


def refuse_without_safetensors(name: str, sizes: Mapping[str, int]) -> None:
    pickles = sorted(path for path in sizes if path.lower().endswith(PICKLES))
    if pickles:
        raise refused(
            "model_pickle_only",
            f"{name} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code",
            "convert the weights to safetensors, or choose a revision that has them",
        )
    raise refused(
        "model_weights_missing",
        f"{name} holds no *.safetensors file",
        "give the folder that holds the weights",
    )


def pick(sizes: Mapping[str, int], weights: Iterable[str]) -> dict[str, int]:
    """Weights and the small files beside them."""
    chosen = {path: sizes[path] for path in weights}
    for path, size in sizes.items():
        if PurePosixPath(path).name != path:
            continue
        if path in SIDE_FILES or path.endswith(SIDE_SUFFIXES):
            if size > MAX_SIDE_BYTES:
                raise refused("model_file_too_large", f"{path}: {size} bytes; at most {MAX_SIDE_BYTES}",
                              "export the tokenizer again")  # fmt: skip
            chosen[path] = size
    return chosen


def read_headers(
    files: ReadableFiles, weights: list[str], sizes: Mapping[str, int]
) -> dict[str, dict[str, TensorHeader]]:
    """The tensors of each file. Files are read eight at a time: over a network a shard costs a round trip."""
    with ThreadPoolExecutor(max_workers=min(8, len(weights))) as pool:
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
