"""The one way in which JSON of a model is read: any UTF, with or without a byte-order mark, without code.

Keys that name code to run are dropped at every depth, so that nobody down the line can obey them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen
from app.core.sources.git_lfs import refuse_pointer

# What transformers takes for the address of code, or for leave to run it.
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")


class ReadableFiles(Protocol):
    """The part of `ModelFiles` that choosing files and reading headers needs."""

    name: str

    def list(self) -> dict[str, int]: ...

    def read(self, path: str, start: int, length: int) -> bytes: ...


class JsonFile(Frozen):
    """An object of a model's file without its `CODE_KEYS`; `code` are those that had a value."""

    value: dict[str, Any]
    code: tuple[str, ...] = ()


def refused(code: str, message: str, remedy: str) -> ModelRefused:
    return ModelRefused(message, code=code, remedy=remedy, param="model")


def read_json(files: ReadableFiles, path: str, sizes: Mapping[str, int], limit: int) -> JsonFile:
    """Raises ModelRefused for a file of more than `limit` bytes, and what `parse_json` raises."""
    if sizes[path] > limit:
        raise refused(
            "model_file_too_large",
            f"{path} has {sizes[path]} bytes; at most {limit} are allowed",
            "export the model again",
        )
    return parse_json(path, files.read(path, 0, sizes[path]))


def json_fault(fault: ValueError | RecursionError) -> str:
    """What is wrong with JSON that `json` does not read, without Python's advice to its programmers."""
    if isinstance(fault, RecursionError):
        return "nested too deeply"
    why = str(fault)
    return "a number has too many digits" if why.startswith("Exceeds the limit") else why


def parse_json(path: str, content: bytes) -> JsonFile:
    """Raises ModelRefused for what is not a JSON object."""
    refuse_pointer(path, content)
    code: dict[str, None] = {}

    def without_code(node: dict[str, Any]) -> dict[str, Any]:
        code.update(dict.fromkeys(key for key in CODE_KEYS if node.get(key)))
        return {key: value for key, value in node.items() if key not in CODE_KEYS}

    try:
        value = json.loads(content, object_hook=without_code)
    except (ValueError, RecursionError) as fault:
        raise refused(
            "model_config_invalid", f"{path} is not valid JSON: {json_fault(fault)}", f"repair {path}"
        ) from fault
    if not isinstance(value, dict):
        raise refused("model_config_invalid", f"{path} is not a JSON object", f"repair {path}")
    return JsonFile(value=value, code=tuple(code))


def as_utf8(path: str, content: bytes) -> bytes:
    """The file as loaders read it, which take a byte-order mark for a fault. Raises ModelRefused."""
    encoding = json.detect_encoding(content)
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding).encode()
    except ValueError as fault:
        raise refused(
            "model_config_invalid", f"{path} is not {encoding}: {fault}", f"repair {path}"
        ) from fault
