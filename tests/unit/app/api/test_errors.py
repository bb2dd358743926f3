from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core._pydantic_core import list_all_errors

from app.api.errors import MANAGED, field_problems, is_inference, problem
from app.core import errors
from app.core.faults.error_answers import STATUS, status_of
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.main import create_app

# What pydantic's own messages say, and ours do not.
PYDANTICS = re.compile(r"Value error|Assertion failed|Invalid JSON:|\bshould (?:be|have|match|contain|not)\b")


def descendants(kind: type[errors.NibbleError]) -> list[type[errors.NibbleError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in descendants(child))]


@pytest.mark.parametrize("kind", descendants(errors.NibbleError))
def test_every_error_has_a_status(kind: type[errors.NibbleError]) -> None:
    assert status_of(kind("it")) in set(STATUS.values())


def test_the_nearest_class_decides() -> None:
    assert status_of(errors.ModelRefused("it")) == 422
    assert status_of(errors.MalformedRequest("it")) == 400


def test_the_management_routes_are_all_named(tmp_path: Path) -> None:
    """What is not among them answers in OpenAI's shape."""
    document = create_app(Settings(state_dir=tmp_path)).openapi()["paths"]
    parts = {
        path.split("/")[2]
        for path, operations in document.items()
        if path.startswith("/v1/")
        for operation in operations.values()
        if operation["tags"] != ["inference"]
    }
    assert parts == MANAGED


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *(("/v1/chat/completions", True), ("/v1/models", True), ("/v1/responses", True), ("/v1", True)),
        *(
            ("/v1/job", True),
            ("/v1/jobs", False),
            ("/v1/jobs/x/y", False),
            ("/", False),
            ("/v2/responses", False),
        ),
        *(("/v10/responses", False), ("", False), ("*", False)),
    ],
)
def test_whose_shape_a_path_answers_in(path: str, expected: bool) -> None:
    assert is_inference(path) is expected


def test_a_problem_says_what_and_what_to_do() -> None:
    answer = problem(errors.QueueFull("full", remedy="wait"))
    body = json.loads(bytes(answer.body))
    assert answer.media_type == "application/problem+json"
    assert answer.headers["retry-after"] == "10"
    assert body == {
        "type": "urn:nibble:problem:queue_full",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "full",
        "code": "queue_full",
        "remedy": "wait",
    }


def test_a_fields_path_has_no_names_of_branches() -> None:
    location = ("recipe", "tuple[Recipe, ...]", 1, "search", "duo_scaling", "literal['both']")
    assert errors.field_path(location) == "recipe.1.search.duo_scaling"


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({"model": "a", "recipe": {"bits": 5}}, {"recipe.bits"}),
        ({"model": "a", "recipe": [{"bits": 4}, {"bits": 5}]}, {"recipe.1.bits"}),
        ({"model": "a", "recipe": 5}, {"recipe"}),
        ({"model": "a", "zip": 1}, {"zip"}),
        ({}, {"model"}),
        ({"model": "a", "labels": {"A B": "x"}}, {"labels.A B"}),
    ],
)
def test_paths_of_refused_bodies(body: dict[str, object], paths: set[str]) -> None:
    with pytest.raises(ValidationError) as refusal:
        JobSpec.model_validate(body)
    found = [{**finding, "loc": ("body", *finding["loc"])} for finding in refusal.value.errors()]
    assert {field.path for field in field_problems(found)} == paths


@pytest.mark.parametrize("known", list_all_errors(), ids=lambda known: str(known["type"]))
def test_no_message_is_in_the_words_of_pydantic(known: dict[str, Any]) -> None:
    message = known["example_message_python"]
    found = {"type": known["type"], "msg": message, "ctx": known.get("example_context") or {}}
    assert not PYDANTICS.search(errors.field_fault(found))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model": "a", "zip": 1}, "there is no such field"),
        ({}, "this field is required"),
        ({"model": "a", "labels": {"A B": "x"}}, "'A B' is not a label's key: at most 63 lower-case letters"),
        ({"model": "a", "webhook": {"url": "ftp://a"}}, "'ftp://a' is not a URL that begins with https://"),
        ({"model": "a", "deploy": {"name": "my model"}}, "'my model' is not a deployment's name: at most 96"),
        ({"model": "a", "formats": ["awq", "awq"]}, "each format may be named once"),
        ({"model": "a", "formats": []}, "at least 1 is needed, here are 0"),
        ({"model": "a", "formats": ["zip"]}, "it must be 'awq', 'compressed-tensors', 'gguf' or 'gptq'"),
        ({"model": "a", "calibration": 5}, "a JSON object is needed"),
    ],
)
def test_refused_fields_are_told_in_words(body: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        JobSpec.model_validate(body)
    found = [{**finding, "loc": ("body", *finding["loc"])} for finding in refusal.value.errors()]
    (field,) = field_problems(found)
    assert field.message.startswith(said)
