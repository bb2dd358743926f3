"""Errors on the wire: RFC 9457 for the management API, OpenAI's shape for inference routes."""

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

from app.api.methods import allowed_methods
from app.core import errors
from app.core.faults.error_answers import headers_of, inference_answer, inference_refusal, status_of

log = logging.getLogger(__name__)

# First path segments of management routes below /v1. Every other path answers in OpenAI's shape.
MANAGED = frozenset({
    "artifacts", "audit", "datasets", "deployments", "downloads", "estimates", "gc", "jobs", "keys",
    "login-links", "logout", "recommendations", "registry", "scrape-targets", "settings", "sources",
    "storage", "tenants", "webhook-deliveries", "webhook-secret", "whoami", "workers",
})  # fmt: skip
TOKENS = ("/tokenize", "/detokenize")  # inference, outside of /v1 as at vLLM
PROBLEM_TYPE = "application/problem+json"
# Pydantic reports every branch of a union; these types only say that a branch has another shape.
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
    """Whether errors of this path use OpenAI's shape, even if the route does not exist."""
    parts = path.split("/")
    if parts[1:2] != ["v1"]:
        return path in TOKENS
    return not MANAGED.intersection(parts[2:3])


def error_response(
    path: str,
    error: errors.NibbleError,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response for `error`, in the shape that callers of `path` expect."""
    if not is_inference(path):
        return problem(error, status=status, headers=headers)
    answer = inference_answer(error, status=status, path=path)
    return JSONResponse(answer.body, status_code=answer.status, headers={**answer.headers, **(headers or {})})


def problem(
    error: errors.NibbleError,
    *,
    status: int | None = None,
    fields: list[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The problem response for `error`."""
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
        headers={**headers_of(error, status), **(headers or {})},
        media_type=PROBLEM_TYPE,
    )


def field_problems(findings: Sequence[Any]) -> list[FieldProblem]:
    """Pydantic's findings, each with the path of the caller's field."""
    problems = [
        FieldProblem(
            path=errors.field_path(finding["loc"][1:]),
            message=errors.field_fault(finding),
            code=finding["type"],
        )
        for finding in findings
    ]
    telling = [problem for problem in problems if problem.code not in SHAPE_ERRORS]
    return [problem for problem in telling if not is_echo(problem, telling)] or problems


def is_echo(problem: FieldProblem, problems: Sequence[FieldProblem]) -> bool:
    """Whether a list counts as too short only because its items were refused."""
    inside = problem.path + "."
    return problem.code == "too_short" and any(other.path.startswith(inside) for other in problems)


def on_nibble_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.NibbleError)
    return error_response(request.url.path, error)


def on_invalid_fields(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    findings = error.errors()
    if any(finding["type"] == "json_invalid" for finding in findings):
        return error_response(request.url.path, errors.MalformedRequest(
            "the body is not valid JSON", code="json_invalid", remedy="send application/json"
        ))  # fmt: skip
    fields = field_problems(findings)
    first = f"{fields[0].path or 'the body'}: {fields[0].message}"
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    of_fields = "correct each field that is named; /openapi.json describes them"
    refusal = errors.InvalidRequest(
        first + more,
        code="validation_failed",
        remedy=of_fields if fields[0].path else "send a JSON object, as Content-Type application/json",
        param=fields[0].path or None,
    )
    if is_inference(request.url.path):
        return error_response(request.url.path, refusal)
    return problem(refusal, fields=fields)


def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Translate the framework's own refusals: unknown routes, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    headers = dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request.scope))
    if is_inference(path):
        refusal = inference_refusal(status, request.method, path)
    else:
        phrase = HTTPStatus(status).phrase.lower()
        refusal = errors.NibbleError(
            f"{request.method} {path}: {phrase}",
            code=phrase.replace(" ", "_"),
            remedy="see /openapi.json for the routes and their methods",
        )
    return error_response(path, refusal, status=status, headers=headers)


def on_redis_error(request: Request, error: Exception) -> JSONResponse:
    log.error("redis failed: %s", error)
    return error_response(
        request.url.path,
        errors.Unavailable(
            f"Redis failed: {error}",
            code="redis_unavailable",
            remedy="try again; if it lasts, the operator checks Redis (/readyz)",
        ),
    )


def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Handle any other error; the server logs its traceback."""
    return error_response(
        request.url.path,
        errors.NibbleError(
            "internal error of the service",
            remedy="report it with the X-Request-ID of this answer",
        ),
    )


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.NibbleError, on_nibble_error)
    app.add_exception_handler(RequestValidationError, on_invalid_fields)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(redis_errors.RedisError, on_redis_error)
    app.add_exception_handler(Exception, on_unexpected)
