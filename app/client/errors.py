"""The errors of the client. Each is a `NibbleError` with a code, a message and a remedy.

A problem also has its `status`, `request_id` and `fields`.

    ServiceUnreachable          no answer came
    ServiceRefused              the service answered with a problem (RFC 9457)
    ├── BadRequest              400
    ├── Unauthenticated         401
    ├── Forbidden               403
    ├── NotFound                404
    ├── Conflict                409
    ├── PreconditionFailed      412
    ├── Invalid                 422, with each field in `fields`
    ├── TooMany                 429; `retry_after_s` where the service says when
    ├── ServiceFault            500 and other faults of the service
    │   └── Unavailable         502, 503, 504
    └── Foreign                 an answer that is not Nibble's
    InferenceRefused            an inference route answered with an error in OpenAI's shape
    JobEnded                    the job failed or was cancelled (`JobAnswer.require_success`)
    WaitTimedOut                `wait_for` ran out of time; the job goes on
    DownloadCorrupt             the received bytes do not match the manifest

Unauthenticated, Forbidden, NotFound, Conflict, PreconditionFailed and Unavailable derive from both
ServiceRefused and the class
of that name in app.core.errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import httpx

from app.core import errors

PASSING = frozenset({429, 502, 503, 504})  # a retry may succeed
# Codes of 429 that last until other work ends or the operator changes a limit.
LASTING = frozenset({"queue_full", "quota_exceeded"})


class FieldFault(NamedTuple):
    path: str
    message: str


class ServiceUnreachable(errors.NibbleError):
    code = "service_unreachable"


class ServiceRefused(errors.NibbleError):
    """The service answered with a problem. `code` and `remedy` are the service's."""

    status = 0
    fields: tuple[FieldFault, ...] = ()
    request_id: str | None = None


class BadRequest(ServiceRefused, errors.MalformedRequest):
    pass


class Invalid(ServiceRefused, errors.InvalidRequest):
    pass


class TooMany(ServiceRefused):
    pass


class ServiceFault(ServiceRefused):
    pass


class Foreign(ServiceRefused):
    code = "unexpected_answer"


class InferenceRefused(errors.NibbleError):
    """The service answered with an error in OpenAI's shape. `code` is the service's."""

    code = "inference_refused"


class JobEnded(errors.NibbleError):
    code = "job_failed"


class WaitTimedOut(errors.NibbleError, TimeoutError):
    code = "wait_timed_out"


class DownloadCorrupt(errors.NibbleError):
    code = "download_corrupt"


def refused(
    error: type[errors.NibbleError], kind: type[ServiceRefused] = ServiceRefused
) -> type[ServiceRefused]:
    """A class of refusals that also derives from the service's error class."""
    return cast("type[ServiceRefused]", type(error.__name__, (kind, error), {"__module__": __name__}))


KINDS: dict[int, type[ServiceRefused]] = {
    400: BadRequest,
    401: refused(errors.Unauthenticated),
    403: refused(errors.Forbidden),
    404: refused(errors.NotFound),
    409: refused(errors.Conflict),
    412: refused(errors.PreconditionFailed),
    422: Invalid,
    429: TooMany,
    **dict.fromkeys((502, 503, 504), refused(errors.Unavailable, ServiceFault)),
}


def unreachable(url: str, fault: httpx.TransportError) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"no answer from {url}: {str(fault) or type(fault).__name__}",
        remedy="start the service with `nibble up`, or name another one with --url or NIBBLE_URL",
    )


def foreign(answer: httpx.Response) -> Foreign:
    return Foreign(
        f"{answer.request.url} sent an answer that is not Nibble's",
        remedy="check that --url names a Nibble service of this version",
    )


def refusal(answer: httpx.Response) -> ServiceRefused:
    """The error for a refused answer whose body has been read."""
    problem = json_object(answer)
    of_inference = problem.get("error")
    if isinstance(of_inference, dict):  # in OpenAI's shape
        message, remedy = split_remedy(str(of_inference.get("message")))
        problem = {**of_inference, "detail": message, "remedy": remedy}
    # The detail covers the first field; the others are appended.
    fields = field_faults(problem)
    message = problem.get("detail") or problem.get("title") or f"HTTP status {answer.status_code}"
    error = kind_of(answer.status_code)(
        "\n".join([str(message), *(f"{field.path}: {field.message}" for field in fields[1:])]),
        code=str(problem.get("code") or f"http_{answer.status_code}"),
        remedy=str(problem.get("remedy") or ""),
        param=problem.get("param"),
        retry_after_s=retry_after(answer),
    )
    error.status = answer.status_code
    error.fields = fields
    error.request_id = answer.headers.get("X-Request-ID")
    return error


def kind_of(status: int) -> type[ServiceRefused]:
    default = ServiceFault if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ServiceRefused
    return KINDS.get(status, default)


def is_passing(error: ServiceRefused) -> bool:
    """Whether the same request may succeed a little later."""
    return error.status in PASSING and error.code not in LASTING


def inference_refusal(answer: httpx.Response) -> InferenceRefused:
    """The error for an inference route's answer whose body has been read."""
    error = json_object(answer).get("error")
    if not isinstance(error, dict):
        return InferenceRefused(f"HTTP status {answer.status_code}", code=f"http_{answer.status_code}")
    return inference_error(error)


def inference_error(error: Mapping[str, Any]) -> InferenceRefused:
    code = error.get("code")
    message, remedy = split_remedy(str(error.get("message")))
    return InferenceRefused(message, remedy=remedy, code=str(code) if code is not None else None)


def split_remedy(message: str) -> tuple[str, str]:
    """An inference route's message without its remedy, and that: it stands at the end, in brackets."""
    depth = 0
    for index in reversed(range(len(message))):
        depth += {")": 1, "(": -1}.get(message[index], 0)
        if depth == 0:
            is_last = message.endswith(")") and message[:index].endswith(" ")
            return (message[: index - 1], message[index + 1 : -1]) if is_last else (message, "")
    return message, ""


def field_faults(problem: Mapping[str, Any]) -> tuple[FieldFault, ...]:
    listed = problem.get("errors")
    if not isinstance(listed, list):
        return ()
    return tuple(FieldFault(str(one.get("path")), str(one.get("message"))) for one in listed)


def json_object(answer: httpx.Response) -> dict[str, Any]:
    try:
        document = answer.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def retry_after(answer: httpx.Response) -> int | None:
    """The seconds of Retry-After; None without one or for a date, which Nibble never sends."""
    value = answer.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() else None
