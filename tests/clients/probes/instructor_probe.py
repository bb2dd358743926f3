"""instructor: records by tools, by strict tools, by formats, in part, and by Responses."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from instructor.v2.core.errors import InstructorRetryException
from pydantic import BaseModel
from rows import ABSENT, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
GREEDY: Any = {"messages": MESSAGES, "temperature": 0, "max_retries": 0}


class City(BaseModel):
    city: Literal["Rome", "Oslo"]


def client_with(mode: str, key: str = SCENE.key) -> Any:
    client = openai.OpenAI(base_url=SCENE.base, api_key=key, max_retries=0, timeout=120)
    return instructor.from_openai(client, mode=getattr(instructor.Mode, mode))


def create(mode: str, **changes: Any) -> None:
    asked = {"model": SCENE.model, "response_model": City, **GREEDY, **changes}
    assert isinstance(client_with(mode).chat.completions.create(**asked), City)


def tools_named() -> None:
    create("TOOLS")
    create("TOOLS_STRICT")


def structured() -> None:
    create("JSON_SCHEMA")


def stream() -> None:
    cities = list(
        client_with("TOOLS").chat.completions.create_partial(model=SCENE.model, response_model=City, **GREEDY)
    )
    assert cities[-1].city in ("Rome", "Oslo")


def responses_tools() -> None:
    asked = {
        "input": QUESTION,
        "model": SCENE.model,
        "response_model": City,
        "temperature": 0,
        "max_retries": 0,
    }
    assert isinstance(client_with("RESPONSES_TOOLS").responses.create(**asked), City)


def unknown_model() -> None:
    create("TOOLS", model=ABSENT)


def wrong_key() -> None:
    client_with("TOOLS", WRONG_KEY).chat.completions.create(model=SCENE.model, response_model=City, **GREEDY)


def too_long() -> None:
    create("TOOLS", messages=[{"role": "user", "content": TOO_LONG}])


report("instructor", (openai.APIStatusError, InstructorRetryException), {
    "tools: named": tools_named, "structured": structured, "stream": stream,
    "responses: tools": responses_tools, "unknown model": unknown_model, "wrong key": wrong_key,
    "too long": too_long,
})  # fmt: skip
