"""Models to choose from: of the newest jobs, in folders, and on a server that speaks the hub's protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest

from app.client import NibbleClient
from app.core.access.api_keys import Scope
from app.core.sources.model_suggestions import DEEPEST, MOST_ENTRIES, local_models
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.integration.hub_server import HubServer, hub_server

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


def sources(client: httpx.Client, q: str = "", **query: object) -> dict[str, Any]:
    answer = client.get("/v1/sources", params={"q": q, **query})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def named(client: httpx.Client, q: str = "", **query: object) -> list[tuple[str, str]]:
    return [(each["origin"], each["reference"]) for each in sources(client, q, **query)["data"]]


def test_models_of_the_tenants_jobs_come_first_and_each_once(service: Service) -> None:
    service.submit()
    assert named(service.client)[0] == ("recent", MODEL)
    assert [reference for _, reference in named(service.client)].count(MODEL) == 1
    assert named(service.client, "WIKI llama")[0] == ("recent", MODEL)
    assert named(service.client, "wiki nowhere") == []
    with NibbleClient(service.url, api_key=ADMIN_KEY) as client:
        answer = client.sources("wikitext", limit=1)
    assert [(each.origin, each.reference) for each in answer.sources] == [("recent", MODEL)]
    # Another tenant has not run it: it lies in a folder that jobs may read.
    with service.client_with(service.key(Scope.JOBS_READ, tenant="other")) as other:
        assert ("folder", MODEL) in named(other)
        assert "recent" not in dict(named(other))


def test_the_hub_is_searched_by_words_and_not_for_addresses(service: Service, hub: HubServer) -> None:
    for name in ("org/small-llama", "org/a-larger-llama", "org/other"):
        hub.push(name, {"config.json": b"{}"})
    found = sources(service.client, "llama", limit=1)
    assert found["hub"] == "asked"
    hits = [each for each in found["data"] if each["origin"] == "hub"]
    assert [(each["reference"], each["downloads"]) for each in hits] == [("hf:org/a-larger-llama", 180)]
    assert ("hub", "hf:org/small-llama") in named(service.client, "hf:org/small")
    before = list(hub.requests)
    for text in ("", "l", MODEL, "/models/llama", "s3://bucket/llama"):
        assert sources(service.client, text)["hub"] == "not_asked"
    assert hub.requests == before


def test_the_hub_is_searched_without_the_services_token(
    service: Service, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Private repositories of its owner are nothing for other tenants."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    hub.push("org/private-llama", {"config.json": b"{}"})
    found = sources(service.client, "llama")
    assert found["hub"] == "no_answer"
    assert "private" not in str(found)


def test_without_a_hub_what_is_here_is_listed_all_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    found = sources(service.client, "wikitext")
    assert found["hub"] == "no_answer"
    assert MODEL in [each["reference"] for each in found["data"]]


def test_a_hub_that_answers_with_a_page_gives_nothing(service: Service, hub: HubServer) -> None:
    hub.answers["/api/models"] = (200, b"<html>log in</html>", {})
    assert sources(service.client, "wikitext")["hub"] == "no_answer"


def test_folders_are_looked_through_within_bounds_and_without_following_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    deep = root.joinpath(*"abcdefgh"[: DEEPEST + 1])
    for folder in (root / "b-model" / "checkpoints", root / "a-model", outside, deep, root / ".cache" / "x"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (root / "b-model" / "config.json").write_text("{}")
    (root / "one.gguf").write_bytes(b"")
    (root / "link").symlink_to(outside)
    assert [path.name for path in local_models([root], [], 9)] == ["one.gguf", "a-model", "b-model"]
    assert [path.name for path in local_models([root], ["b-m"], 9)] == ["b-model"]
    assert len(local_models([root], [], 2)) == 2
    for name in (b"lat\xffin", b"esc\x1b[31m"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).mkdir()
        Path(os.fsdecode(os.fsencode(root) + b"/" + name + b"/config.json")).write_text("{}")
    assert len(local_models([root], [], 9)) == 3
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    (crowd / "z-model").mkdir()
    (crowd / "z-model" / "config.json").write_text("{}")
    for number in range(MOST_ENTRIES):
        (crowd / f"{number}.txt").touch()
    assert local_models([crowd], [], 9) == []
