"""Where text comes from: bundled sets, a fetched file, or the request itself."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from app.core.errors import TextRefused
from app.core.records.specs import TextSpec
from app.core.sources.text_content import documents_of
from app.core.sources.text_shapes import Document

BUILTIN = ("wikitext2",)


def read_documents(spec: TextSpec, file: Path | None, *, split: Literal["valid", "test"]) -> list[Document]:
    """The documents of a spec.

    Raises TextRefused for an unknown set, an empty text or a malformed line.
    """
    if spec.texts is not None:
        documents = [Document(text=text) for text in spec.texts]
    elif file is not None:
        documents = list(documents_of(file.name, file.read_bytes()))
    else:
        documents = [Document(text=builtin_text(spec.source, split))]
    documents = [document for document in documents if not document.is_empty]
    if not documents:
        raise TextRefused(f"{spec.source} holds no text", code="text_empty", remedy="give text with content")
    return documents


def builtin_text(source: str, split: str) -> str:
    name = source.removeprefix("builtin:")
    if name not in BUILTIN:
        raise TextRefused(
            f"there is no bundled text {source!r}", code="dataset_not_found",
            remedy=f"use one of: {', '.join('builtin:' + builtin for builtin in BUILTIN)}",
        )  # fmt: skip
    return files("workers.texts").joinpath("builtin", name, f"{split}.txt").read_text("utf-8")
