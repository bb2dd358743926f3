"""Request headers that shape an answer: entity tags, ranges, preferences."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel

from app.core.errors import PreconditionFailed

MAX_WAIT_S = 60
WAIT = re.compile(r"\s*wait\s*=\s*(\d{1,6})\s*", re.IGNORECASE)
SINGLE_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Not changed."}}
IfNoneMatch = Annotated[str | None, Header()]
IdempotencyKey = Annotated[
    str | None, Header(description="Repeating a request with the same key creates nothing twice.")
]


class ByteRange(NamedTuple):
    """Bytes `start` to `end`, exclusive."""

    start: int
    end: int


class UnsatisfiableRange(Exception):
    """No byte of the file is in the range."""


def matches_tag(if_none_match: str | None, etag: str) -> bool:
    """Whether the caller already has this version (weak comparison, RFC 9110 section 13.1.2)."""
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


class Change(NamedTuple):
    """A request that changes a resource with revisions."""

    request: Request
    if_match: str | None

    def require_match(self, revision: int) -> None:
        """Raise PreconditionFailed unless a tag of If-Match names this revision (see `entity_tag`)."""
        if self.if_match is None:
            return
        tags = [tag.strip().removeprefix("W/").strip('"') for tag in self.if_match.split(",")]
        if "*" not in tags and str(revision) not in [tag.partition("-")[0] for tag in tags]:
            raise PreconditionFailed(
                "it was changed after it was read",
                remedy="read it again: its new ETag is what If-Match must say",
                param="If-Match",
            )


def change_of(
    request: Request,
    if_match: Annotated[
        str | None,
        Header(description="The ETag of the answer that was read: refused with 412 if a change came since."),
    ] = None,
) -> Change:
    return Change(request, if_match)


ChangeParam = Annotated[Change, Depends(change_of)]


def entity_tag(body: bytes, revision: int | None) -> str:
    """The tag of an answer.

    One with a revision names it first: If-Match compares that alone, as load and the states of servers, which
    are in the body too, change all the time.
    """
    digest = hashlib.sha256(body).hexdigest()[:32]
    return f'"{digest}"' if revision is None else f'"{revision}-{digest}"'


def tagged_answer(
    value: BaseModel,
    if_none_match: str | None,
    hints: Mapping[str, str] | None = None,
    *,
    revision: int | None = None,
) -> Response:
    """Answer `value` as JSON with an ETag, or 304 if the caller has it; both with the headers `hints`."""
    body = value.model_dump_json().encode()
    etag = entity_tag(body, revision)
    headers = {**(hints or {}), "ETag": etag, "Cache-Control": "private, no-cache"}
    if matches_tag(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def preferred_wait(prefer: str | None) -> int | None:
    """Seconds of `Prefer: wait=N`, at most MAX_WAIT_S. Unknown preferences are ignored (RFC 7240)."""
    for preference in (prefer or "").split(","):
        match = WAIT.fullmatch(preference)
        if match:
            return min(int(match[1]), MAX_WAIT_S)
    return None


def requested_range(header: str | None, size: int) -> ByteRange | None:
    """The single requested byte range; None for the whole file.

    Several ranges or an unknown unit are ignored, as RFC 9110 section 14.2 allows.
    """
    match = SINGLE_RANGE.fullmatch(header) if header is not None else None
    if match is None or (not match[1] and not match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size or start >= end:
        raise UnsatisfiableRange
    return ByteRange(start, end)
