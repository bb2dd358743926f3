"""Errors on the wire: one table from error class to status, one shape (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from redis import exceptions as redis_errors
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.core import errors

log = logging.getLogger(__name__)

STATUS: dict[type[errors.NibbleError], int] = {
    errors.MalformedRequest: 400,
    errors.InvalidRequest: 422,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.QueueFull: 429,
    errors.QuotaExceeded: 429,
    errors.RateLimited: 429,
    errors.Unavailable: 503,
    errors.NibbleError: 500,
}
HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "10"},
    503: {"Retry-After": "5"},
}
INFERENCE_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models")
INFERENCE_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
PROBLEM_TYPE = "application/problem+json"
# Of a union's branches pydantic reports each; these types say only that a branch has another shape.
SHAPE_ERRORS = frozenset({"tuple_type", "model_type", "model_attributes_type"})


class FieldProblem(BaseModel):
    path: str
    message: str
    code: str


class ProblemDocument(BaseModel):
    """The body of every error of the management API."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    remedy: str
    param: str | None = None
    errors: list[FieldProblem] | None = None


def is_inference(path: str) -> bool:
    """True for the routes whose callers expect errors in OpenAI's shape."""
    return path.startswith(INFERENCE_ROUTES)


def inference_problem(
    error: errors.NibbleError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer that tells of `error` in OpenAI's shape."""
    status = status if status is not None else status_of(error)
    told = {
        "message": f"{error.message} ({error.remedy})" if error.remedy else error.message,
        "type": INFERENCE_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": error.param,
        "code": error.code,
    }
    return JSONResponse({"error": told}, status_code=status, headers=answer_headers(error, status, headers))


def told(
    request: Request,
    error: errors.NibbleError,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer that tells of `error` in the shape that the route's callers expect."""
    if is_inference(request.url.path):
        return inference_problem(error, status=status, headers=headers)
    return problem(error, status=status, headers=headers)


def status_of(error: errors.NibbleError) -> int:
    """The status of the nearest class in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem(
    error: errors.NibbleError,
    *,
    status: int | None = None,
    fields: list[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer that tells of `error`."""
    status = status if status is not None else status_of(error)
    document = ProblemDocument(
        type=f"urn:nibble:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=error.message,
        code=error.code,
        remedy=error.remedy,
        param=error.param,
        errors=fields,
    )
    return JSONResponse(
        document.model_dump(exclude_none=True),
        status_code=status,
        headers=answer_headers(error, status, headers),
        media_type=PROBLEM_TYPE,
    )


def answer_headers(error: errors.NibbleError, status: int, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = {**HEADERS.get(status, {}), **(more or {})}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return headers


def field_problems(found: Sequence[Any]) -> list[FieldProblem]:
    """Pydantic's findings with the path of the field that a caller wrote."""
    problems = [
        FieldProblem(
            path=errors.field_path(finding["loc"][1:]),
            message=errors.field_fault(finding),
            code=finding["type"],
        )
        for finding in found
    ]
    telling = [problem for problem in problems if problem.code not in SHAPE_ERRORS]
    return [problem for problem in telling if not is_echo(problem, telling)] or problems


def is_echo(problem: FieldProblem, found: Sequence[FieldProblem]) -> bool:
    """True for a list that counts as too short because its items were refused."""
    inside = problem.path + "."
    return problem.code == "too_short" and any(other.path.startswith(inside) for other in found)


def on_nibble_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.NibbleError)
    return told(request, error)


def on_invalid_fields(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(finding["type"] == "json_invalid" for finding in found):
        return problem(errors.MalformedRequest(
            "the body is not valid JSON", code="json_invalid", remedy="send application/json"
        ))  # fmt: skip
    fields = field_problems(found)
    first = f"{fields[0].path or 'the body'}: {fields[0].message}"
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    of_fields = "correct each field that is named; /openapi.json describes them"
    refusal = errors.InvalidRequest(
        first + more,
        code="validation_failed",
        remedy=of_fields if fields[0].path else "send a JSON object, as Content-Type application/json",
        param=fields[0].path or None,
    )
    return problem(refusal, fields=fields)


def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown routes, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    refusal = errors.NibbleError(
        f"{request.method} {request.url.path}: {phrase.lower()}",
        code=phrase.lower().replace(" ", "_"),
        remedy="see /openapi.json for the routes and their methods",
    )
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request))
    return told(request, refusal, status=error.status_code, headers=headers)


def allowed_methods(request: Request) -> list[str]:
    """Of all routes with this path: the framework names those of the first one only."""
    methods: set[str] = set()
    for route in request.app.router.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)


def on_redis_error(request: Request, error: Exception) -> JSONResponse:
    log.error("redis failed: %s", error)
    return told(
        request,
        errors.Unavailable(
            f"Redis failed: {error}",
            code="redis_unavailable",
            remedy="try again; if it lasts, the operator checks Redis (/readyz)",
        ),
    )


def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """The last handler: the server logs the error with its traceback."""
    return told(
        request,
        errors.NibbleError(
            "the service met an error of its own",
            remedy="report it with the X-Request-ID of this answer",
        ),
    )


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.NibbleError, on_nibble_error)
    app.add_exception_handler(RequestValidationError, on_invalid_fields)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(redis_errors.RedisError, on_redis_error)
    app.add_exception_handler(Exception, on_unexpected)
