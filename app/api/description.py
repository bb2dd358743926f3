"""The OpenAPI document: the framework's, with the errors that every route may return."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from app.api.errors import PROBLEM_TYPE, ProblemDocument, is_inference
from app.api.schema_forms import with_readable_schemas
from app.core.faults.error_answers import STATUS
from app.core.records.ids import (
    ARTIFACT_ID_PATTERN,
    DATASET_ID_PATTERN,
    DELIVERY_ID_PATTERN,
    JOB_ID_PATTERN,
    ULID_PATTERN,
)

PROBLEMS = sorted({*STATUS.values(), 413} - {500})
OPEN_PROBLEMS = (403, 422, 503)  # of routes that need no key
EVENT_ID_PATTERN = r"^\d{1,15}-\d{1,15}$"
# Patterns of parameters, for the document only: the routes check them and answer 400, where the framework
# would answer 422.
PATTERNS = {
    ("/v1/jobs", "after"): JOB_ID_PATTERN,
    ("/v1/jobs", "label"): r"^[^=]+=",
    ("/v1/jobs/{job_id}/events", "after"): EVENT_ID_PATTERN,
    # An empty id means the start, as in the specification of server-sent events.
    ("/v1/jobs/{job_id}/events", "last-event-id"): r"^(\d{1,15}-\d{1,15})?$",
    ("/v1/artifacts", "after"): ARTIFACT_ID_PATTERN,
    ("/v1/registry", "after"): ARTIFACT_ID_PATTERN,
    ("/v1/datasets", "after"): DATASET_ID_PATTERN,
    ("/v1/deployments", "after"): rf"^dep_{ULID_PATTERN}$",
    ("/v1/audit", "after"): EVENT_ID_PATTERN,
    ("/v1/webhook-deliveries", "after"): DELIVERY_ID_PATTERN,
}
EVERYWHERE = {"idempotency-key": r"^[\x20-\x7e]{1,255}$"}
INTRODUCTION: dict[str, Any] = {
    "summary": "Quantizes language models.",
    "description": "Jobs quantize a model of a hub or a folder and publish artifacts; deployments serve them "
    "behind OpenAI's routes. Errors are RFC 9457 problems, on inference routes OpenAI's. Fields and query "
    "parameters that a route does not have are refused, but for inference.",
    "contact": {"name": "the operator of this service"},
    "servers": [{"url": "/", "description": "this service"}],
    "openapi_tags": [
        {"name": "inference", "description": "Answers of deployed models, by OpenAI's routes."},
        {"name": "jobs", "description": "Quantize a model: submit, watch, cancel, read what came of it."},
        {"name": "webhooks", "description": "Messages about a job's state, and the secret that signs them."},
        {"name": "artifacts", "description": "Quantized models: list, download, tag, push to a hub, delete."},
        {"name": "datasets", "description": "Texts of your own, uploaded for calibration and evaluation."},
        {"name": "workers", "description": "The processes that work on jobs and serve models."},
        {"name": "deployments", "description": "Serve an artifact under a name."},
        {"name": "keys", "description": "API keys and their scopes."},
        {"name": "tenants", "description": "Limits of each tenant."},
        {"name": "audit", "description": "Who changed what."},
        {"name": "sessions", "description": "Log a browser in and out."},
        {"name": "storage", "description": "What is stored, and the collection of what nobody needs."},
        {"name": "operations", "description": "Health, metrics, settings and the dashboard."},
    ],
}
CONTENT_SCHEMAS: dict[str, dict[str, Any]] = {  # texts and streams are strings
    "application/octet-stream": {"type": "string", "format": "binary"},
    "application/json": {"type": "object", "additionalProperties": True},
}
FRAMEWORK_SCHEMAS = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI) -> None:
    """Add the problem answers to the application's OpenAPI document."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = with_readable_schemas(with_problems(derive()))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's own way to extend the document


def with_problems(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in FRAMEWORK_SCHEMAS:
        schemas.pop(name, None)
    problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["ProblemDocument"] = problem
    for path, operations in document["paths"].items():
        for operation in operations.values():
            add_problems(path, operation)
            add_content_schemas(operation)
            for parameter in operation.get("parameters", ()):
                name, schema = parameter["name"], without_null(parameter["schema"])
                parameter["schema"] = schema
                add_pattern(schema, PATTERNS.get((path, name)) or EVERYWHERE.get(name))
    # A browser gets the dashboard, a program an index.
    document["paths"]["/"]["get"]["responses"]["200"]["content"]["application/json"] = {
        "schema": CONTENT_SCHEMAS["application/json"]
    }
    return document


def add_problems(path: str, operation: dict[str, Any]) -> None:
    """The errors of one operation; those that it already describes stay."""
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422", "")):
        del answers["422"]
    is_open = "security" not in operation
    statuses: Sequence[int] = (*OPEN_PROBLEMS, *((404,) if "{" in path else ())) if is_open else PROBLEMS
    if is_inference(path):  # where a wrong field is 400
        statuses = [status for status in statuses if status != 422]
    for status in statuses:
        answers.setdefault(str(status), problem_answer(path, status))


def add_content_schemas(operation: dict[str, Any]) -> None:
    """What answers without a model hold: without a schema, generated clients drop them."""
    for answer in operation["responses"].values():
        for media_type, content in answer.get("content", {}).items():
            if not content.get("schema"):
                content["schema"] = CONTENT_SCHEMAS.get(media_type, {"type": "string"})


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter, which is absent and never null: `null` would be a text."""
    branches = [branch for branch in schema.get("anyOf", ()) if branch != {"type": "null"}]
    if not branches:
        return schema
    if len(branches) == 1 and "$ref" in branches[0]:
        return dict(branches[0])
    rest = {key: value for key, value in schema.items() if key != "anyOf" and value is not None}
    return {**rest, **branches[0]} if len(branches) == 1 else {**rest, "anyOf": branches}


def add_pattern(schema: dict[str, Any], pattern: str | None) -> None:
    """Set the pattern on a schema's string, alone, in a union or in a list."""
    if pattern is None:
        return
    for branch in schema.get("anyOf", [schema.get("items", schema)]):
        if branch.get("type") == "string":
            branch["pattern"] = pattern


def problem_answer(path: str, status: int) -> dict[str, Any]:
    if is_inference(path):
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    else:
        content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    return {"description": HTTPStatus(status).phrase, "content": content}
