"""What a slip would turn into another request is refused: types of fields, names of query parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute

from app.api.errors import is_inference
from app.api.query_parameters import parameters_of
from app.core.access.api_keys import Scope
from app.core.records.ids import new_id
from app.core.settings import Settings
from app.main import ROUTES, create_app
from tests.integration.api_service import Service
from tests.unit.app.api.test_errors import PYDANTICS

# What is no value of each type. 44.0 is an integer in JSON, and every integer is a number.
OTHERS: dict[str, tuple[object, ...]] = {
    "boolean": (1, 0, "yes", "true", 1.0),
    "integer": (True, "44", 44.5),
    "number": (True, "44"),
}
# Bad values of parameters as they stand in a URL: of numbers, times, booleans, words and lengths.
BAD = (
    "-1",
    "x",
    "1.5",
    "99999999999",
    "9" * 5000,
    "2026-13-45",
    "2026-11-28T12:00:00+01:00",
    "a" * 3000,
    "%20",
)
IDS: dict[str, object] = {
    "job_id": new_id("job"), "artifact_id": new_id("art"), "deployment_id": new_id("dep"),
    "dataset_id": new_id("ds"), "push_id": new_id("push"), "delivery_id": "msg_x", "key_id": "0" * 16,
    "tenant": "default", "slot": 0, "path": "x",
}  # fmt: skip


def types_of(schema: dict[str, Any]) -> set[str]:
    """The types of JSON that a property takes, but null."""
    branches = schema.get("anyOf", [schema])
    return {str(branch.get("type", "object")) for branch in branches} - {"null"}


def properties(
    document: dict[str, Any], schema: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The path and the types of every property of a body, also in records within it."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for branch in schema.get("anyOf", ()):
        yield from properties(document, branch)
    for name, inner in schema.get("properties", {}).items():
        yield (name,), types_of(inner)
        for path, types in properties(document, inner):
            yield (name, *path), types


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and schema of each JSON body but those of inference."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content and not is_inference(path):
                yield method.upper(), path, content["application/json"]["schema"]


def nested(path: tuple[str, ...], value: object) -> object:
    for name in reversed(path):
        value = {name: value}
    return value


def test_no_boolean_integer_or_number_takes_another_type(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    seen: dict[str, int] = {}
    taken = []
    for method, path, schema in bodies(document):
        for field, types in properties(document, schema):
            for kind in types & OTHERS.keys() if "string" not in types else ():
                for value in OTHERS[kind] if len(types) == 1 else (True,):
                    answer = service.client.request(method, path.format(**IDS), json=nested(field, value))
                    name = ".".join(field)
                    seen[kind] = seen.get(kind, 0) + 1
                    faults = answer.json().get("errors", ()) if answer.status_code == 422 else ()
                    if name not in {fault["path"] for fault in faults}:
                        taken.append(f"{method} {path} {name}: {value!r} -> {answer.status_code}")
    assert taken == []
    assert seen["boolean"] >= 50
    assert seen["integer"] >= 60
    assert seen["number"] >= 10


@pytest.mark.parametrize("content", [b'{"model": "a", "model": "b"}', b' [{"x": {"b": 1, "a": 2, "b": 1}}]'])
def test_a_key_that_occurs_twice_is_refused_on_every_route(service: Service, content: bytes) -> None:
    document = service.client.get("/openapi.json").json()
    of_inference = [
        ("POST", path) for path, operations in document["paths"].items()
        if is_inference(path) and "post" in operations
    ]  # fmt: skip
    asked = [*((method, path) for method, path, _ in bodies(document)), *of_inference]
    assert len(asked) >= 15
    assert len(of_inference) >= 5
    for method, path in asked:
        headers = {"Content-Type": "application/json"}
        answer = service.client.request(method, path.format(**IDS), content=content, headers=headers)
        body = answer.json()
        error = body.get("error", body)
        assert answer.status_code == 400, (method, path, answer.text)
        assert "occurs twice" in error.get("message", error.get("detail", "")), (path, answer.text)
        assert ("error" in body) is is_inference(path)
        assert error.get("code", "json_key_repeated") == "json_key_repeated"


@pytest.mark.parametrize("content", [b'{"model": "a", "labels": {"model": "b"}}', b'{"model": "a"'])
def test_a_key_within_another_object_is_another_one(service: Service, content: bytes) -> None:
    answer = service.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.json().get("code") != "json_key_repeated"


def test_whole_floats_are_integers(service: Service) -> None:
    limits = {"active_jobs": 44.0}
    assert service.client.put("/v1/tenants/default/limits", json=limits).json()["limits"]["active_jobs"] == 44
    job = service.submit(calibration={"num_samples": 16.0}, recipe={"search": {"grid_points": 20.0}})
    assert job["spec"]["calibration"]["num_samples"] == 16
    assert job["spec"]["recipe"]["search"]["grid_points"] == 20


def test_a_refused_type_is_told_in_words(service: Service) -> None:
    answer = service.client.post("/v1/deployments", json={"name": "x", "replicas": True})
    faults = {fault["path"]: fault["message"] for fault in answer.json()["errors"]}
    assert faults["replicas"] == "a whole number is needed"


def test_a_parameter_that_a_route_does_not_have_is_refused_on_every_route(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    answers = {}
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/") or is_inference(path):
            continue
        for method in operations:
            answer = service.client.request(method, path.format(**IDS), params={"stat": "failed"})
            answers[f"{method} {path}"] = (answer.status_code, answer.json().get("code"))
    assert len(answers) >= 40
    assert set(answers.values()) == {(422, "unknown_parameter")}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/artifacts", "/v1/audit", "/v1/workers"])
def test_a_refusal_names_the_parameter_and_the_known_ones(service: Service, path: str) -> None:
    document = service.client.get("/openapi.json").json()
    parameters = document["paths"][path]["get"].get("parameters", ())
    known = [each["name"] for each in parameters if each["in"] == "query"]
    problem = service.client.get(path, params={"stat": "failed"}).json()
    assert problem["param"] == "stat"
    assert f"GET {path} has no parameter 'stat'" in problem["detail"]
    assert problem["remedy"] == f"leave it out; it takes {', '.join(known) or 'none'}"


def test_a_parameter_is_refused_after_the_caller_and_is_in_the_audit_log(service: Service) -> None:
    client, beta = service.client, {"beta": "true"}
    stranger = {"Authorization": "Bearer nib_0000_none"}
    assert client.post("/v1/jobs", params=beta, headers=stranger, json={}).status_code == 401
    reader = {"Authorization": f"Bearer {service.key(Scope.JOBS_READ)}"}
    assert client.post("/v1/jobs", params=beta, headers=reader, json={}).status_code == 403
    request_id = client.post("/v1/jobs", params=beta, json={}).headers["X-Request-ID"]
    entry = client.get("/v1/audit", params={"q": request_id}).json()["data"][0]
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/jobs", 422)


def test_inference_takes_parameters_that_it_does_not_know(service: Service) -> None:
    assert service.client.get("/v1/models", params={"api-version": "2026-01-01"}).status_code == 200


def test_the_parameters_of_each_route_are_those_of_the_document() -> None:
    described = create_app(Settings()).openapi()["paths"]
    compared = 0
    for route in (route for module in ROUTES for route in module.router.routes):
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in route.methods or ():
                parameters = described[route.path_format][method.lower()].get("parameters", ())
                known = [each["name"] for each in parameters if each["in"] == "query"]
                assert list(parameters_of(route)) == known
                compared += 1
    assert compared >= 50


def test_no_parameter_of_the_document_is_null(service: Service) -> None:
    """In a URL or a header `null` is a text; a generated client would send it."""
    document = service.client.get("/openapi.json").json()
    parameters = [
        (path, each["name"], each["schema"])
        for path, operations in document["paths"].items()
        for operation in operations.values()
        for each in operation.get("parameters", ())
    ]
    nullable = [
        (path, name) for path, name, schema in parameters if {"type": "null"} in schema.get("anyOf", ())
    ]
    assert nullable == []
    keys = [schema for _, name, schema in parameters if name.lower() == "idempotency-key"]
    assert len(keys) >= 5
    assert {schema["pattern"] for schema in keys} == {r"^[\x20-\x7e]{1,255}$"}


def test_no_bad_parameter_is_told_in_the_words_of_pydantic(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    refused = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for each in operation.get("parameters", ()):
                if each["in"] == "header":
                    continue
                for value in BAD:
                    here = {**IDS, **({each["name"]: value} if each["in"] == "path" else {})}
                    query = f"?{each['name']}={value}" if each["in"] == "query" else ""
                    answer = service.client.request(method, path.format(**here) + query)
                    refused += answer.status_code in (400, 422)
                    if answer.status_code >= 400:
                        assert not PYDANTICS.search(answer.text), (method, path, query, answer.text)
    assert refused >= 100


@pytest.mark.parametrize(
    ("since", "status"),
    [("0.5", 422), ("1795885311", 422), ("2026-11-28", 200), ("2026-11-28T12:00:00+01:00", 200)],
)
def test_a_time_is_a_date_and_no_number(service: Service, since: str, status: int) -> None:
    assert service.client.get("/v1/audit", params={"since": since}).status_code == status
