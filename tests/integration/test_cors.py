"""Pages of other origins: none by default, those that the operator lists with an API key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, Service, running_service

PAGE = "http://localhost:3000"
CHANGES = ("/v1/jobs", "/v1/chat/completions", "/v1/keys")
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@pytest.fixture(params=(("http://localhost:3000", "app://obsidian.md"), ("*",)), ids=("list", "any"))
def open_service(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Iterator[Service]:
    settings = Settings(
        state_dir=tmp_path,
        redis_url=redis_url,
        bootstrap_api_key=ADMIN_KEY,
        cors_origins=request.param,
    )
    with running_service(settings) as service:
        yield service


@pytest.mark.parametrize("path", CHANGES)
def test_a_listed_page_may_ask_and_reads_the_answer(open_service: Service, path: str) -> None:
    with open_service.client_with(None) as visitor:
        allowed = visitor.options(path, headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] in (PAGE, "*")
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in allowed.headers
    answer = open_service.client.post(path, headers={"Origin": PAGE}, json={})
    assert answer.status_code not in (401, 403), answer.text
    assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
    assert "*" in answer.headers["access-control-expose-headers"]


def test_a_refusal_can_be_read_by_the_page(open_service: Service) -> None:
    with open_service.client_with("wrong-key") as visitor:
        answer = visitor.get("/v1/jobs", headers={"Origin": PAGE})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] in (PAGE, "*")


@pytest.mark.parametrize("path", CHANGES)
def test_a_session_is_of_no_use_to_another_page(open_service: Service, path: str) -> None:
    link = open_service.client.post("/v1/login-links").json()["path"]
    with open_service.client_with(None) as browser:
        browser.get(link)
        answer = browser.post(path, headers={"Origin": PAGE}, json={})
        assert answer.status_code == 403
        assert "origin_forbidden" in answer.text
        own = browser.post("/v1/jobs", headers={"Origin": open_service.url}, json={})
    assert own.status_code == 422


@pytest.mark.parametrize("path", CHANGES)
def test_by_default_no_other_page_may_ask(service: Service, path: str) -> None:
    assert service.client.options(path, headers=PREFLIGHT).status_code == 405
    answer = service.client.post(path, headers={"Origin": PAGE}, json={})
    assert answer.status_code == 403
    assert "NIBBLE_CORS_ORIGINS" in answer.text
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_is_not_listed_may_not(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path,
        redis_url=redis_url,
        bootstrap_api_key=ADMIN_KEY,
        cors_origins=("https://chat.example",),
    )
    with running_service(settings) as service:
        refused = service.client.options("/v1/jobs", headers=PREFLIGHT)
        assert refused.status_code == 400
        assert service.client.post("/v1/jobs", headers={"Origin": PAGE}, json={}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "https://chat.example/", "https://chat.example/app", "*,https://a.b"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CORS_ORIGINS", origin)
    with pytest.raises(ValidationError, match="is no origin"):
        Settings()


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-API-Key"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models"])
def test_a_key_counts_in_the_headers_of_other_clients(service: Service, name: str, path: str) -> None:
    with service.client_with(None) as client:
        assert client.get(path, headers={name: ADMIN_KEY}).status_code == 200
        assert client.get(path, headers={name: "wrong-key"}).status_code == 401
        # A bearer's key goes first, so a proxy's own header can't replace it.
        both = {"Authorization": "Bearer wrong-key", name: ADMIN_KEY}
        assert client.get(path, headers=both).status_code == 401
