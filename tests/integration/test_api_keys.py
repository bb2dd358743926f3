"""Keys, sessions, and pages that don't belong here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from app.api.keys import KeyRequest
from app.core.access.api_keys import Scope, digest, key_id
from app.core.access.idempotency import IdempotencyKeys
from tests.integration.api_service import ADMIN_KEY, MODEL, Service


def create(service: Service, **body: Any) -> dict[str, Any]:
    answer = service.client.post("/v1/keys", json={"scopes": ["jobs:read"], **body})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_a_key_is_shown_once_and_works_for_its_tenant_and_scopes(service: Service) -> None:
    made = create(service, tenant="search", name="ci")
    with service.client_with(made["key"]) as client:
        assert client.get("/v1/jobs").json()["data"] == []
        assert client.post("/v1/jobs", json={"model": MODEL}).status_code == 403
    listed = {key["id"]: key for key in service.client.get("/v1/keys").json()["data"]}
    assert "key" not in listed[made["id"]]
    assert (listed[made["id"]]["tenant"], listed[made["id"]]["name"]) == ("search", "ci")
    assert listed[made["id"]]["last_used_at"] is not None
    kept = service.redis.get(f"nibble:key:{made['id']}")
    assert made["key"].encode() not in kept
    assert digest(made["key"]).encode() in kept


def test_the_same_idempotency_key_makes_one_key(service: Service) -> None:
    def ask(_: int = 0, **body: Any) -> httpx.Response:
        return service.client.post(
            "/v1/keys", json={"scopes": ["jobs:read"], "name": "ci", **body}, headers={"Idempotency-Key": "k"}
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 15
    (made,) = (answer.json() for answer in answers if answer.status_code == 201)
    (refused,) = {answer.text.partition('"instance"')[0] for answer in answers if answer.status_code == 409}
    assert "key_made_before" in refused
    assert made["id"] in refused
    assert made["key"] not in refused
    assert [key["id"] for key in service.client.get("/v1/keys").json()["data"] if key["name"] == "ci"] == [
        made["id"]
    ]
    with service.client_with(made["key"]) as client:
        assert client.get("/v1/jobs").status_code == 200
    assert ask(name="other").json()["code"] == "idempotency_key_reused"
    service.client.delete(f"/v1/keys/{made['id']}").raise_for_status()
    assert ask().json()["code"] == "idempotency_key_spent"


def test_a_key_whose_request_died_half_way_is_made_by_its_repetition(service: Service) -> None:
    body = KeyRequest(scopes=(Scope.JOBS_READ,))
    request = f"key {body.model_dump_json()}"
    IdempotencyKeys(service.redis).claim("default", "k", request, "0123456789abcdef")
    answer = service.client.post("/v1/keys", json={"scopes": ["jobs:read"]}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["id"]) == (201, "0123456789abcdef")


def test_a_revoked_key_is_refused_at_once(service: Service) -> None:
    made = create(service)
    with service.client_with(made["key"]) as client:
        assert client.get("/v1/jobs").status_code == 200
        assert service.client.delete(f"/v1/keys/{made['id']}").status_code == 204
        assert client.get("/v1/jobs").json()["code"] == "api_key_unknown"
    assert service.client.delete(f"/v1/keys/{made['id']}").json()["code"] == "key_not_found"


def test_a_revoked_key_is_refused_at_once_by_inference_routes(service: Service) -> None:
    made = create(service, scopes=["inference"])
    with service.client_with(made["key"]) as client:
        assert {client.get("/v1/models").status_code for _ in range(5)} == {200}
        assert client.post("/v1/completions", json={"model": "none"}).status_code == 404
        assert service.client.delete(f"/v1/keys/{made['id']}").status_code == 204
        refused = client.post("/v1/completions", json={"model": "none"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "api_key_unknown")
        assert client.get("/v1/models").status_code == 401


def test_an_expired_key_is_refused(service: Service) -> None:
    made = create(service, expires_in_s=60)
    name = f"nibble:key:{made['id']}"
    record = service.redis.get(name).replace(made["expires_at"][:4].encode(), b"2001")
    service.redis.set(name, record)
    with service.client_with(made["key"]) as client:
        assert client.get("/v1/jobs").json()["code"] == "api_key_expired"


def test_a_tenants_admin_manages_its_own_keys_only(service: Service) -> None:
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        assert {key["tenant"] for key in client.get("/v1/keys").json()["data"]} == {"other"}
        assert client.get("/v1/keys?tenant=default").json()["code"] == "tenant_forbidden"
        foreign = client.post("/v1/keys", json={"tenant": "default", "scopes": ["admin"]})
        higher = client.post("/v1/keys", json={"scopes": ["operator"]})
        assert (foreign.json()["code"], higher.json()["code"]) == ("tenant_forbidden", "scope_missing")
        own = client.post("/v1/keys", json={"scopes": ["jobs:read"]}).json()
        assert own["tenant"] == "other"
        assert client.delete(f"/v1/keys/{key_id(ADMIN_KEY)}").status_code == 404


@contextmanager
def logged_in(service: Service) -> Iterator[httpx.Client]:
    link = service.client.post("/v1/login-links").json()["path"]
    with service.client_with(None) as browser:
        answer = browser.get(link)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert browser.get(link).json()["code"] == "login_link_invalid"
        yield browser


def test_a_login_link_opens_one_session(service: Service) -> None:
    with logged_in(service) as browser:
        assert browser.get("/v1/jobs").status_code == 200
        assert ADMIN_KEY not in str(browser.cookies)
        made = browser.post("/v1/jobs", json={"model": MODEL}, headers={"Origin": service.url})
        assert made.status_code == 202
        assert browser.post("/v1/logout", headers={"Origin": service.url}).status_code == 204
        assert browser.get("/v1/jobs").status_code == 401


def test_a_browser_gets_a_page_for_an_old_link(service: Service) -> None:
    """A page without a session, the dashboard with one; programs get the problem."""
    with logged_in(service) as browser:
        browser.headers["Accept"] = "text/html,*/*"
        answer = browser.get("/login?code=old")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        browser.cookies.clear()
        answer = browser.get("/login?code=old")
        assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert "nibble login" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_caller_is_told_who_it_is(service: Service) -> None:
    with service.client_with(service.key(Scope.JOBS_READ, tenant="other")) as client:
        caller = client.get("/v1/whoami").json()
    assert (caller["tenant"], caller["scopes"]) == ("other", ["jobs:read"])
    admin = service.client.get("/v1/whoami").json()
    assert (admin["key"], len(admin["scopes"])) == (key_id(ADMIN_KEY), len(Scope))
    with service.client_with(None) as stranger:
        assert stranger.get("/v1/whoami").status_code == 401


def test_logins_are_in_the_audit_log(service: Service) -> None:
    """A link that is opened again is told once, codes that are nobody's never: neither floods the log."""
    link = service.client.post("/v1/login-links").json()["path"]
    with service.client_with(None) as browser:
        answers = [
            browser.get(path).status_code for path in (link, link, link, "/login?code=x", "/login?code=")
        ]
    assert answers == [303, 401, 401, 401, 401]
    entries = service.client.get("/v1/audit").json()["data"]
    assert [(entry["method"], entry["path"], entry["status"]) for entry in entries] == [
        ("GET", "/login", 401), ("GET", "/login", 303), ("POST", "/v1/login-links", 201),
    ]  # fmt: skip
    assert {entry["key_id"] for entry in entries} == {key_id(ADMIN_KEY)}


def test_a_session_ends_with_its_key(service: Service) -> None:
    made = create(service)
    with service.client_with(made["key"]) as client:
        link = client.post("/v1/login-links").json()["path"]
    with service.client_with(None) as browser:
        browser.get(link)
        assert browser.get("/v1/jobs").status_code == 200
        service.client.delete(f"/v1/keys/{made['id']}")
        assert browser.get("/v1/jobs").json()["code"] == "api_key_unknown"


def changes(service: Service) -> list[tuple[str, str]]:
    """Every route of the description that changes something."""
    paths = service.client.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in paths.items()
        for method in methods
        if method not in ("get", "head")
    ]


def code_of(answer: httpx.Response) -> str:
    """The inference routes answer in OpenAI's shape, or in Anthropic's, which has no codes but types."""
    body = answer.json()
    fault: dict[str, str] = body.get("error", body)
    return fault.get("code") or fault["type"]


def expected_code(path: str, code: str) -> str:
    return "permission_error" if path.startswith("/v1/messages") else code


def test_a_foreign_page_changes_nothing_with_a_session(service: Service) -> None:
    with logged_in(service) as browser:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", None):
            headers = {"Origin": origin} if origin is not None else {}
            expected = "origin_missing" if origin is None else "origin_forbidden"
            for method, path in changes(service):
                if path.startswith("/v1/"):
                    answer = browser.request(method, path, headers=headers)
                    assert (answer.status_code, code_of(answer)) == (403, expected_code(path, expected)), path


def test_a_foreign_name_is_refused_by_every_method(service: Service) -> None:
    """A page that let its own name point here (DNS rebinding)."""
    for method, path in [("GET", "/"), ("GET", "/v1/jobs"), *changes(service)]:
        answer = service.client.request(method, path, headers={"Host": "evil.example:8420"})
        assert (answer.status_code, code_of(answer)) == (403, expected_code(path, "host_forbidden")), path
