"""The bundled tasks: what their script writes, with names that the API admits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from app.core.records.specs import BUNDLED_TASKS
from tests.golden.make_tasks import TASKS, TEXTS, lines_of

FOLDER: Path = TEXTS / "tasks"


@pytest.mark.parametrize("name", TASKS)
def test_the_documents_are_those_of_the_script(name: str) -> None:
    assert (FOLDER / f"{name}.jsonl").read_text("utf-8") == lines_of(TASKS[name]())


def test_the_api_admits_the_tasks_that_lie_there() -> None:
    assert {f"builtin:{path.stem}" for path in FOLDER.glob("*.yaml")} == set(BUNDLED_TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_each_answer_is_one_of_the_choices_and_each_place_holds_its_share(name: str) -> None:
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)  # type: ignore[attr-defined]
    config = yaml.load((FOLDER / f"{name}.yaml").read_text("utf-8"), loader)  # a safe loader
    documents = [
        json.loads(line)
        for line in (FOLDER / config["dataset_kwargs"]["file"]).read_text("utf-8").splitlines()
    ]
    count = len(documents[0]["choices"])
    assert len(documents) == 200
    for place in range(count):
        share = sum(document["answer"] == place for document in documents) / len(documents)
        assert share == pytest.approx(1 / count, abs=0.1)
    assert all(len(set(document["choices"])) == count for document in documents)
