"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from app.core.errors import (
    InvalidRequest,
    MalformedRequest,
    NibbleError,
    NotFound,
    QueueFull,
    Unavailable,
)

RETRY_AFTER_S = 2
# The first class that fits: its status, and the `type` of the error.
KINDS: tuple[tuple[type[NibbleError], int, str], ...] = (
    (MalformedRequest, 400, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (NotFound, 404, "invalid_request_error"),
    (QueueFull, 429, "rate_limit_error"),
    (Unavailable, 503, "service_unavailable_error"),
    (NibbleError, 500, "server_error"),
)


def kind_of(error: NibbleError) -> tuple[int, str]:
    """HTTP status and `type`."""
    return next((status, name) for kind, status, name in KINDS if isinstance(error, kind))


def error_body(error: NibbleError) -> dict[str, Any]:
    message = f"{error.message}; {error.remedy}" if error.remedy else error.message
    return {
        "error": {"message": message, "type": kind_of(error)[1], "param": error.param, "code": error.code}
    }


def retry_headers(error: NibbleError) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, QueueFull | Unavailable) else {}
