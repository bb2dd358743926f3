"""Turns the hub's error answers into refusals with its own reason and a remedy.

The hub names the cause in `X-Error-Code` and says it in `X-Error-Message`, as huggingface_hub 2.4 reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import httpx

from app.core.errors import ModelRefused, Unavailable

MAX_REASON = 300  # characters of the hub's own words
BAD_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105  # what the hub says, no secret
TOO_MANY = 429


class Asked(NamedTuple):
    """A request to the hub, for messages."""

    name: str  # hf:org/name@revision
    page: str  # for people
    has_token: bool


class Meaning(NamedTuple):
    """The error for a cause: code, message, and the remedies without and with a token."""

    code: str
    what: str
    without_token: str
    with_token: str


CHECK_ID = "check the id; for a private one send a hub_token, or let the operator set HF_TOKEN"
MEANINGS: Mapping[str, Meaning] = {
    "GatedRepo": Meaning(
        "model_gated",
        "is gated",
        "accept its terms at {page}, then send a token of that account as hub_token (nibble submit "
        "--hub-token), or let the operator set HF_TOKEN to it",
        "let the account of the token (hub_token, else HF_TOKEN) accept the terms at {page}, and the token "
        "read gated repositories",
    ),
    "RevisionNotFound": Meaning(
        "model_not_found", "does not exist in this revision", *("name a branch, tag or commit of {page}",) * 2
    ),
    "EntryNotFound": Meaning("model_not_found", "lacks the file", *("look at the files of {page}",) * 2),
    "RepoNotFound": Meaning(
        "model_not_found",
        "does not exist, or is private",
        CHECK_ID,
        "check the id; if it is private, let the account of the token (hub_token, else HF_TOKEN) read it",
    ),
    "BadToken": Meaning(
        "model_forbidden",
        "can't be read",
        *("send another hub_token; without one, let the operator renew HF_TOKEN",) * 2,
    ),
    "Forbidden": Meaning(
        "model_forbidden",
        "may not be read",
        CHECK_ID,
        "let the token (hub_token, else HF_TOKEN) have the permission to read it",
    ),
    "BadRequest": Meaning("model_not_found", "is not understood by the hub", *("check id and revision",) * 2),
}
BY_STATUS = {400: "BadRequest", 401: "RepoNotFound", 403: "Forbidden", 404: "RepoNotFound"}


def check_answer(answer: httpx.Response, asked: Asked) -> None:
    """Raise the error of an unsuccessful answer.

    ModelRefused if another request would meet it again, else Unavailable.
    """
    if answer.is_success:
        return
    reason = stated_reason(answer)
    meaning = meaning_of(answer, reason)
    if meaning is None:
        raise Unavailable(
            f"the hub answers {answer.status_code} for {asked.name}{reason and f': {reason}'}",
            remedy="try again later"
            + (
                "; with a hub_token, or HF_TOKEN, the hub allows more requests"
                if answer.status_code == TOO_MANY
                else ""
            ),
        )
    remedy = meaning.with_token if asked.has_token else meaning.without_token
    raise ModelRefused(
        f"{asked.name} {meaning.what}; the hub says: {reason or f'status {answer.status_code}'}",
        code=meaning.code,
        remedy=remedy.format(page=asked.page),
        param="model",
    )


def meaning_of(answer: httpx.Response, reason: str) -> Meaning | None:
    if reason.startswith(BAD_TOKEN):
        return MEANINGS["BadToken"]
    cause = answer.headers.get("X-Error-Code", "")
    return MEANINGS.get(cause) or MEANINGS.get(BY_STATUS.get(answer.status_code, ""))


def stated_reason(answer: httpx.Response) -> str:
    """The hub's own words, on one line and of bounded length; empty if it says nothing."""
    words = " ".join(answer.headers.get("X-Error-Message", "").split())
    return "".join(filter(str.isprintable, words))[:MAX_REASON]
