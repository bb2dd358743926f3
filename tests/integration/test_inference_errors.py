"""Errors of inference routes: the gateway and the inference server tell each of them in one way, OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from app.api.errors import install, is_inference
from app.core import errors
from tests.integration.api_service import ADMIN_KEY, Service
from workers.serving.routes import create_app
from workers.serving.served_model import ServedModel

EXPECTED = {
    errors.NibbleError: (500, "server_error"),
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.BodyTooLarge: (413, "invalid_request_error"),
    errors.BodyTooSlow: (408, "invalid_request_error"),
    errors.Unauthenticated: (401, "invalid_request_error"),
    errors.Forbidden: (403, "invalid_request_error"),
    errors.NotFound: (404, "invalid_request_error"),
    errors.Conflict: (409, "invalid_request_error"),
    errors.PreconditionFailed: (412, "invalid_request_error"),
    errors.QueueFull: (429, "rate_limit_error"),
    errors.QuotaExceeded: (429, "rate_limit_error"),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.Unavailable: (503, "service_unavailable_error"),
}
ADDED_LATER = ("content-length", "date", "server")


def descendants(kind: type[errors.NibbleError]) -> Iterator[type[errors.NibbleError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from descendants(child)


class Refusing:
    """A model whose every name is refused with one error."""

    def __init__(self, error: errors.NibbleError) -> None:
        self.error = error

    def check_name(self, _name: str) -> None:
        raise self.error


def gateway(error: errors.NibbleError) -> ASGIApp:
    app = FastAPI()
    install(app)

    @app.get("/v1/models/{name}")
    def read_model(name: str) -> None:
        raise error

    @app.post("/v1/completions")
    def complete() -> None:
        raise error

    return app


def server(error: errors.NibbleError) -> ASGIApp:
    return create_app(cast(ServedModel, Refusing(error)))


def asked(app: ASGIApp, method: str, path: str) -> tuple[int, Any, dict[str, str]]:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path)

    answer = asyncio.run(ask())
    headers = {name: value for name, value in answer.headers.items() if name not in ADDED_LATER}
    if "allow" in headers:  # which is a set
        headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
    return answer.status_code, answer.json(), headers


@pytest.mark.parametrize("remedy", ["", "change it"])
@pytest.mark.parametrize("kind", list(descendants(errors.NibbleError)), ids=lambda kind: kind.__name__)
def test_both_surfaces_answer_an_error_alike(kind: type[errors.NibbleError], remedy: str) -> None:
    error = kind("it is so", remedy=remedy, param="model")
    answers = [asked(surface(error), "GET", "/v1/models/x") for surface in (gateway, server)]
    status, name = next(EXPECTED[each] for each in kind.__mro__ if each in EXPECTED)
    message = "it is so (change it)" if remedy else "it is so"
    body = {"message": message, "type": name, "param": "model", "code": kind.code}
    assert answers[0] == answers[1]
    assert answers[0][:2] == (status, {"error": body})
    assert ("retry-after" in answers[0][2]) == (status in (429, 503) and kind.passes_by_itself)


def test_both_surfaces_pass_on_when_to_ask_again() -> None:
    error = errors.Unavailable("it loads", retry_after_s=17)
    for surface in (gateway, server):
        assert asked(surface(error), "GET", "/v1/models/x")[2]["retry-after"] == "17"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/files", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models/x", 405, "method_not_allowed"),
    ],
)
def test_both_surfaces_refuse_routes_alike(method: str, path: str, status: int, code: str) -> None:
    answers = [asked(surface(errors.NibbleError("it")), method, path) for surface in (gateway, server)]
    assert answers[0] == answers[1]
    assert answers[0][0] == status
    assert answers[0][1]["error"]["code"] == code
    assert ("allow" in answers[0][2]) == (status == 405)


UNKNOWN = [
    *("GET /v1/responses/resp_1", "POST /v1/responses/compact", "POST /v1/files"),
    *("GET /v1/files", "POST /v1/batches", "POST /v1/audio/speech", "POST /v1/audio/transcriptions"),
    *("POST /v1/images/generations", "POST /v1/moderations", "POST /v1/rerank"),
    *("POST /v1/fine_tuning/jobs", "GET /v1/vector_stores", "POST /v1/v1/messages", "GET /v1", "GET /v1/"),
    *("POST /v1/chat", "DELETE /v1/chat/completions/x"),
]


@pytest.mark.parametrize("route", UNKNOWN)
def test_unknown_routes_of_inference_clients_answer_in_openais_shape(service: Service, route: str) -> None:
    answer = service.client.request(*route.split(" "))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "unknown_url")
    assert answer.headers["content-type"] == "application/json"
    for known in (
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models and GET /v1/models/{id}",
    ):
        assert known in error["message"]


@pytest.mark.parametrize("name", ["x", "org/name", "org/name/more", "org%2Fname"])
def test_a_model_that_is_not_there_is_no_unknown_route(service: Service, name: str) -> None:
    answer = service.client.get(f"/v1/models/{name}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert repr(name.replace("%2F", "/")) in error["message"]


def test_the_list_of_models_may_end_in_a_slash(service: Service) -> None:
    assert service.client.get("/v1/models/").json() == service.client.get("/v1/models").json()


@pytest.mark.parametrize("route", ["GET /v1/jobs/x/y", "GET /v1/keys/x/y/z", "GET /nope", "GET /v2/jobs"])
def test_unknown_routes_of_the_management_api_are_problems(service: Service, route: str) -> None:
    answer = service.client.request(*route.split(" "))
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_openais_client_shows_why_a_route_is_unknown(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=ADMIN_KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions") as refusal:
            client.responses.retrieve("resp_1")
        assert refusal.value.code == "unknown_url"
        with pytest.raises(openai.NotFoundError, match="POST /v1/moderations: not found"):
            client.moderations.create(input="Hi")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_foreign_page_is_refused_in_openais_shape(service: Service, path: str) -> None:
    answer = service.client.post(path, json={}, headers={"Origin": "https://evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_forbidden")


def test_a_body_that_is_too_large_is_told_alike(service: Service) -> None:
    answer = service.client.post("/v1/completions", content=b"x" * 200_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"


def test_every_405_names_the_methods(service: Service) -> None:
    """Of every path of the description, also where several routes share it."""
    paths = service.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 20
    for path, methods in paths.items():
        expected = {method.upper() for method in methods}
        if "GET" in expected and path != "/login":
            expected.add("HEAD")
        other = "PUT" if "patch" in methods else "PATCH"
        answer = service.client.request(other, path.replace("{", "").replace("}", ""))
        assert answer.status_code == 405, path
        assert set(answer.headers["allow"].split(", ")) == expected, path
        assert ("error" in answer.json()) == is_inference(path), path
    assert set(service.client.post("/assets/x").headers["allow"].split(", ")) == {"GET", "HEAD"}


HEADED = [
    *("/healthz", "/readyz", "/metrics", "/", "/openapi.json", "/assets/api.js"),
    *("/v1/jobs", "/v1/artifacts", "/v1/deployments", "/v1/workers", "/v1/keys", "/v1/audit", "/v1/models"),
]


@pytest.mark.parametrize("path", HEADED)
def test_head_answers_as_get_without_a_body(service: Service, path: str) -> None:
    for _ in range(2):  # the second time lists come from what is kept
        head, get = service.client.head(path), service.client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers.get("etag") == get.headers.get("etag")


@pytest.mark.parametrize("accept", ["text/html", "application/json"])
def test_head_of_the_dashboard(service: Service, accept: str) -> None:
    head = service.client.head("/", headers={"Accept": accept})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith(accept)


def test_head_ends_where_get_would_wait_for_events(service: Service) -> None:
    job_id = service.submit()["id"]
    head = service.client.head(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    assert service.client.get(f"/v1/jobs/{job_id}").status_code == 200  # over the same connection


def test_head_refuses_as_get_does(service: Service) -> None:
    with service.client_with(None) as stranger:
        assert stranger.head("/v1/jobs").status_code == 401
        assert stranger.head("/healthz").status_code == 200
    assert service.client.head("/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV").status_code == 404
    assert service.client.head("/v1/chat/completions").status_code == 405


def test_head_does_not_use_up_a_login_link(service: Service) -> None:
    """Chat programs look at the links that are sent through them."""
    link = service.client.post("/v1/login-links").json()["path"]
    with service.client_with(None) as browser:
        looked = browser.head(link)
        assert (looked.status_code, looked.headers["allow"]) == (405, "GET")
        assert browser.get(link).status_code in (200, 303)
        assert browser.get("/v1/jobs").status_code == 200
