"""What generated clients need of the OpenAPI document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from app.main import create_app


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("state")
    return create_app(Settings(state_dir=folder)).openapi()


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in document["paths"].values() for operation in path.values()]


def test_operation_ids_are_short_and_their_own(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document)]
    assert len(ids) == len(set(ids)) > 50
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+){0,3}", each) for each in ids), ids
    assert {"submit_job", "read_job", "read_report", "read_file", "create_deployment"} <= set(ids)


def test_the_service_and_each_tag_are_described(document: dict[str, Any]) -> None:
    assert document["servers"] == [{"url": "/", "description": "this service"}]
    assert document["info"]["description"]
    assert document["info"]["contact"]
    described = {tag["name"] for tag in document["tags"]}
    assert all(tag["description"] for tag in document["tags"])
    assert {tag for operation in operations(document) for tag in operation["tags"]} == described


def test_every_answer_with_content_has_a_schema(document: dict[str, Any]) -> None:
    schemas = {
        (operation["operationId"], status, media_type): content.get("schema")
        for operation in operations(document)
        for status, answer in operation["responses"].items()
        for media_type, content in answer.get("content", {}).items()
    }
    assert [each for each, schema in schemas.items() if not schema] == []
    binary = {"type": "string", "format": "binary"}
    assert schemas["read_file", "200", "application/octet-stream"] == binary
    assert schemas["read_file", "206", "application/octet-stream"] == binary
    assert schemas["create_chat_completion", "200", "text/event-stream"] == {"type": "string"}
    assert schemas["create_chat_completion", "200", "application/json"]["type"] == "object"
    reports = schemas["read_report", "200", "application/json"]["anyOf"]
    assert [each["$ref"].rpartition("/")[2] for each in reports] == ["Report", "UnfinishedReport"]
