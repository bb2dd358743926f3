"""Translates errors to HTTP: the status, and on inference routes the whole answer.

The gateway and the inference servers answer the same routes, so both take status, body and headers from
`inference_answer`. They are OpenAI's, whose clients choose their exception by the status: `error` holds
`message`, `type`, `param` and `code`, and each field that is wrong is 400, never 422.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from app.core import errors

# The nearest class in the tree decides.
STATUS: Mapping[type[errors.NibbleError], int] = {
    errors.BodyTooLarge: 413,
    errors.BodyTooSlow: 408,
    errors.MalformedRequest: 400,
    errors.InvalidRequest: 422,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.QueueFull: 429,
    errors.QuotaExceeded: 429,
    errors.RateLimited: 429,
    errors.Unavailable: 503,
    errors.NibbleError: 500,
}
INFERENCE_STATUS: Mapping[type[errors.NibbleError], int] = {**STATUS, errors.InvalidRequest: 400}
HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "10"},
    503: {"Retry-After": "5"},
}
# Room for one more answer comes sooner than room for one more job.
INFERENCE_HEADERS: Mapping[int, Mapping[str, str]] = {
    **HEADERS, 429: {"Retry-After": "2"}, 503: {"Retry-After": "2"},
}  # fmt: skip
# OpenAI names what was exceeded (`requests`, `tokens`); here it is one word for all limits.
INFERENCE_TYPES: Mapping[int, str] = {429: "rate_limit_error", 503: "service_unavailable_error"}


ANTHROPIC = "/v1/messages"
ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
SERVER_ERROR = HTTPStatus.INTERNAL_SERVER_ERROR


class InferenceAnswer(NamedTuple):
    """An error as inference routes answer it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def inference_answer(
    error: errors.NibbleError, *, status: int | None = None, path: str = ""
) -> InferenceAnswer:
    """Status, JSON body and headers of `error`; `status` where the web framework refused by itself.

    Below ANTHROPIC the body is Anthropic's, whose clients read it.
    """
    status = status if status is not None else status_of(error, INFERENCE_STATUS)
    headers = headers_of(error, status, INFERENCE_HEADERS)
    if path.startswith(ANTHROPIC):
        kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= SERVER_ERROR else "invalid_request_error")
        message = f"{error.message} ({error.remedy})" if error.remedy else error.message
        return InferenceAnswer(
            status, {"type": "error", "error": {"type": kind, "message": message}}, headers
        )
    usual = "server_error" if status >= SERVER_ERROR else "invalid_request_error"
    body = {
        "message": f"{error.message} ({error.remedy})" if error.remedy else error.message,
        "type": INFERENCE_TYPES.get(status, usual),
        "param": error.param,
        "code": error.code,
    }
    return InferenceAnswer(status, {"error": body}, headers)


def inference_refusal(status: int, method: str, path: str) -> errors.NibbleError:
    """The error for a missing route or method, which the web framework refuses by itself."""
    phrase = HTTPStatus(status).phrase.lower()
    return errors.NibbleError(
        f"{method} {path[:200]}: {phrase}",
        code="unknown_url" if status == HTTPStatus.NOT_FOUND else phrase.replace(" ", "_"),
        remedy="there are POST /v1/chat/completions, POST /v1/completions, POST /v1/responses, "
        "POST /v1/messages, POST /tokenize, POST /detokenize, GET /v1/models and GET /v1/models/{id}",
    )


def status_of(error: errors.NibbleError, table: Mapping[type[errors.NibbleError], int] = STATUS) -> int:
    """The status of the nearest class in the table."""
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def headers_of(
    error: errors.NibbleError, status: int, usual: Mapping[int, Mapping[str, str]] = HEADERS
) -> dict[str, str]:
    """The headers that belong to a status; an error that knows when to ask again says so."""
    headers = dict(usual.get(status, {})) if error.passes_by_itself else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return headers
