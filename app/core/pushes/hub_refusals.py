"""Why the hub does not take a push, with a remedy."""

from __future__ import annotations

import httpx

from app.core.errors import InvalidRequest, Unavailable
from app.core.records.specs import PushOptions
from app.core.sources.hub_answers import stated_reason

MAX_REASON = 300  # characters of the hub's own words
REMEDIES = {
    401: "send a token that may write to the repository: hub_token, or nibble push --hub-token",
    403: "let the token have the permission to write to the repository, or to create it",
    404: "check account, name and branch, and that the token may see the repository",
    409: "push again: the repository was changed at the same time",
    412: "push again: the repository was changed at the same time",
    413: "the file is larger than the hub takes: lower NIBBLE_SHARD_BYTES and quantize again",
}


def check_push(answer: httpx.Response, options: PushOptions, what: str) -> None:
    """Raise the error of an unsuccessful answer: `what` completes "the repository …".

    Unavailable where the same push may succeed later, else InvalidRequest.
    """
    if answer.is_success:
        return
    status = answer.status_code
    reason = stated_reason(answer) or said_in_body(answer) or f"status {status}"
    message = f"hf:{options.repo_id} {what}; the hub says: {reason}"
    if status >= 500 or status in (408, 409, 412, 425, 429):
        raise Unavailable(message, code="hub_unavailable", remedy="the push goes on by itself")
    remedy = REMEDIES.get(status, "change what the hub names, and push again")
    raise InvalidRequest(message, code="push_refused", remedy=remedy, param="repo_id")


def said_in_body(answer: httpx.Response) -> str:
    """`error` of a JSON body, as the hub writes it; empty if there is none."""
    try:
        said = answer.json().get("error", "")
    except (ValueError, AttributeError):
        return ""
    words = " ".join(str(said).split())
    return "".join(filter(str.isprintable, words))[:MAX_REASON]


def refuse_token(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the hub token can't push: {why}",
        code="hub_token_refused",
        remedy="make one with the role `write`, or a fine-grained one that may write to the repository",
        param="hub_token",
    )
