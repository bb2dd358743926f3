"""Models that a caller may mean: in the folders that may be read, and on the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from app.core.errors import NibbleError
from app.core.outgoing.address_guard import IpNetwork
from app.core.sources.hub_model import hub_client, limited_body, refuse_offline

log = logging.getLogger(__name__)

MOST_ENTRIES = 5000  # of all roots that are looked at
DEEPEST = 4  # folders below a root
HUB_LIMIT_S = 4.0  # somebody is typing
LEAST_LETTERS = 2  # before the hub is asked


class HubEntry(BaseModel):
    """What we use of a line of the hub's search."""

    id: str = Field(min_length=1, max_length=200)
    downloads: int = 0


hub_entries: TypeAdapter[list[HubEntry]] = TypeAdapter(list[HubEntry])


def matches_words(text: str, words: Sequence[str]) -> bool:
    """Whether each word, in lower case, occurs in the text."""
    return all(word in text.lower() for word in words)


def local_models(roots: Sequence[Path], words: Sequence[str], limit: int) -> list[Path]:
    """Folders with config.json, and GGUF files, whose path holds all words; without unprintable names."""
    named: list[Path] = []
    for root in roots:
        real = Path(os.path.realpath(root))
        for path in models_below(real):
            if str(path).isprintable() and matches_words(str(path), words):
                named.append(path)
            if len(named) == limit:
                return named
    return named


def models_below(root: Path) -> Iterator[Path]:
    """By name, without following links; a folder with a model is not searched further."""
    entries = 0
    for parent, folders, files in os.walk(root):
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            return
        here = Path(parent)
        depth = len(here.relative_to(root).parts)
        if "config.json" in files:
            folders.clear()
            yield here
        else:
            folders[:] = [] if depth == DEEPEST else sorted(each for each in folders if each[0] != ".")
            yield from (here / name for name in sorted(files) if name.endswith(".gguf"))


def hub_models(text: str, *, networks: Sequence[IpNetwork], limit: int) -> list[HubEntry] | None:
    """The hub's search, most downloads first, without a token; None where the hub does not answer."""
    from huggingface_hub.constants import ENDPOINT

    query = {"search": text, "limit": str(limit), "sort": "downloads", "direction": "-1"}
    try:
        refuse_offline(text)
        with hub_client(networks) as client:
            # Its owner's private repositories are nothing for other tenants.
            client.headers.pop("Authorization", None)
            with client.stream("GET", f"{ENDPOINT}/api/models", params=query, timeout=HUB_LIMIT_S) as answer:
                answer.raise_for_status()
                body = limited_body(answer)
        return hub_entries.validate_json(body)[:limit]
    except (NibbleError, httpx.HTTPError, ValidationError) as fault:
        log.info("the hub does not answer a search: %s", fault)
        return None
