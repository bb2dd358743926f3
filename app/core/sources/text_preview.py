"""What a text file holds, from its beginning: how many documents, how much text, the first lines."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

from app.core.errors import TextRefused
from app.core.records.dataset import TextPreview
from app.core.sources.text_content import (
    GZIP,
    broken_packing,
    decoded,
    documents_in,
    documents_of,
    is_one_value,
    text_form,
)
from app.core.sources.text_shapes import Document

PREVIEW_BYTES = 16 * 1024**2  # of a file are read for it, packed or not
FIRST, FIRST_CHARACTERS = 3, 400  # documents that are shown, and of each


class Beginning(NamedTuple):
    """The first bytes of a file, unpacked, and which share of the file they are."""

    content: bytes
    share: float

    @property
    def is_whole(self) -> bool:
        return self.share == 1


def preview_of(name: str, head: bytes, size: int) -> TextPreview:
    """`head` are the first PREVIEW_BYTES of the file's `size` bytes, or all of them.

    Raises TextRefused for what can't be read, and for a whole file without any text.
    """
    beginning = beginning_of(name, head, size)
    if beginning.is_whole:
        documents = list(documents_of(name, beginning.content))
        if all(document.is_empty for document in documents):
            raise TextRefused(f"{name} holds no text", code="text_empty", remedy="give text with content")
        return counted(documents, 1)
    if b"\n" not in beginning.content:  # one line beyond what is read: it tells no count
        return TextPreview(documents=None, conversations=None, text_bytes=None, is_estimate=True, first=())
    text = decoded(name, beginning.content[: beginning.content.rfind(b"\n") + 1], of_part=True)
    form = text_form(name)
    if form == "rows" and not is_one_value(name, text):
        return counted(documents_in(name, text[: text.rfind("\n") + 1]), beginning.share)
    if form == "text":
        return counted([Document(text=text)], beginning.share, is_one=True)
    # The beginning of a table or of one JSON value may end amid a row.
    return TextPreview(documents=None, conversations=None, text_bytes=None, is_estimate=True,
                       first=(text[:FIRST_CHARACTERS],))  # fmt: skip


def beginning_of(name: str, head: bytes, size: int) -> Beginning:
    if not head.startswith(GZIP):
        return Beginning(head, len(head) / size)
    unpacking = zlib.decompressobj(wbits=31)
    try:
        content = unpacking.decompress(head, PREVIEW_BYTES)
    except zlib.error as fault:
        raise broken_packing(name, fault) from fault
    if len(head) == size and not unpacking.eof and len(content) < PREVIEW_BYTES:
        raise broken_packing(name, EOFError("it ends amid the packed text"))
    used = len(head) - len(unpacking.unconsumed_tail) - len(unpacking.unused_data)
    return Beginning(content, 1 if unpacking.eof and used == size else min(used / size, 1 - 1e-9))


def counted(documents: Iterable[Document], share: float, *, is_one: bool = False) -> TextPreview:
    """The preview of all documents, of which these are the `share`."""
    count, conversations, size, first = 0, 0, 0, list[str]()
    for document in documents:
        text = shown(document)
        count, size = count + 1, size + len(text.encode())
        conversations += document.text is None
        if len(first) < FIRST:
            first.append(text[:FIRST_CHARACTERS])
    return TextPreview(
        documents=count if is_one else round(count / share),
        conversations=round(conversations / share),
        text_bytes=round(size / share),
        is_estimate=share < 1,
        first=tuple(first),
    )


def shown(document: Document) -> str:
    """The text, or the turns as lines of `role: content`."""
    if document.text is not None:
        return document.text
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in document.messages or ())
