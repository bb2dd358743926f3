"""Where text comes from: bundled sets, a fetched file, or the request itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from app.core.errors import TextRefused
from app.core.specs import TextSpec

BUILTIN = ("wikitext2",)


@dataclass(frozen=True)
class Document:
    """Plain text, or the turns of a conversation and the tools that it may call."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


def read_documents(spec: TextSpec, file: Path | None, *, part: Literal["valid", "test"]) -> list[Document]:
    """The documents of a spec.

    Raises TextRefused for an unknown set, an empty text or a malformed line.
    """
    if spec.texts is not None:
        documents = [Document(text=text) for text in spec.texts]
    elif file is not None:
        documents = list(file_documents(file))
    else:
        documents = [Document(text=builtin_text(spec.source, part))]
    documents = [document for document in documents if document.messages or (document.text or "").strip()]
    if not documents:
        raise TextRefused(f"{spec.source} holds no text", code="text_empty", remedy="give text with content")
    return documents


def builtin_text(source: str, part: str) -> str:
    name = source.removeprefix("builtin:")
    if name not in BUILTIN:
        raise TextRefused(
            f"there is no bundled text {source!r}", code="dataset_not_found",
            remedy=f"use one of: {', '.join('builtin:' + known for known in BUILTIN)}",
        )  # fmt: skip
    return files("workers.texts").joinpath("builtin", name, f"{part}.txt").read_text("utf-8")


def file_documents(file: Path) -> Iterator[Document]:
    """One document a line of a jsonl file (`text` or `messages`); any other file is one document."""
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError as fault:
        raise TextRefused(
            f"{file.name} is not UTF-8 text", code="text_malformed", remedy="convert it to UTF-8"
        ) from fault
    if file.suffix not in (".jsonl", ".ndjson"):
        yield Document(text=content)
        return
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield parse_line(file.name, number, line)


def parse_line(name: str, number: int, line: str) -> Document:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and is_text(entry.get("text")):
        return Document(text=entry["text"])
    if isinstance(entry, dict) and is_conversation(entry.get("messages")):
        return Document(messages=entry["messages"])
    raise TextRefused(
        f"{name}, line {number}: expected an object with `text`, or with `messages` of role and content",
        code="text_malformed", remedy='write lines such as {"text": "…"}',
    )  # fmt: skip


def is_text(value: object) -> bool:
    """True for a string that can be written as UTF-8: JSON's escapes can name half of a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and is_text(turn.get("role")) and is_text(turn.get("content"))
            for turn in value
        )
    )
