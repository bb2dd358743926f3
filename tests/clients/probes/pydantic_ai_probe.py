"""pydantic-ai: texts, streams, agents with tools, records by tools and by formats, Responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from rows import ABSENT, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

SETTINGS: Any = {"temperature": 0}


class City(BaseModel):
    city: Literal["Rome", "Oslo"]


def model_with(key: str = SCENE.key, name: str = SCENE.model, kind: Any = OpenAIChatModel) -> Any:
    return kind(name, provider=OpenAIProvider(base_url=SCENE.base, api_key=key), settings=SETTINGS)


model = model_with()


def chat() -> None:
    result = Agent(model).run_sync(QUESTION)
    same(result.output, SCENE.said)


async def stream() -> None:
    async with Agent(model).run_stream(QUESTION) as result:
        same("".join([each async for each in result.stream_text(delta=True)]), SCENE.said)


def visiting(kind: Any = OpenAIChatModel) -> None:
    """The agent calls a tool of its own accord, and answers from the result."""
    visits = []
    agent = Agent(model_with(kind=kind))

    @agent.tool_plain
    def visit(city: Literal["Rome", "Oslo"]) -> str:
        visits.append(city)
        return "Sunny"

    same(agent.run_sync(QUESTION).output, SCENE.after)
    same(visits, [SCENE.called["arguments"]["city"]])


def tools_auto() -> None:
    visiting()


def tools_required() -> None:
    assert isinstance(Agent(model, output_type=ToolOutput(City)).run_sync(QUESTION).output, City)


def structured() -> None:
    assert isinstance(Agent(model, output_type=NativeOutput(City)).run_sync(QUESTION).output, City)


def responses() -> None:
    same(Agent(model_with(kind=OpenAIResponsesModel)).run_sync(QUESTION).output, SCENE.said)


def responses_tools() -> None:
    visiting(OpenAIResponsesModel)


def unknown_model() -> None:
    Agent(model_with(name=ABSENT)).run_sync(QUESTION)


def wrong_key() -> None:
    Agent(model_with(WRONG_KEY)).run_sync(QUESTION)


def too_long() -> None:
    Agent(model).run_sync(TOO_LONG)


report("pydantic-ai-slim", (ModelHTTPError,), {
    "chat": chat, "stream": stream, "tools: auto": tools_auto, "tool results": tools_auto,
    "tools: required": tools_required, "structured": structured, "responses": responses,
    "responses: tools": responses_tools, "unknown model": unknown_model, "wrong key": wrong_key,
    "too long": too_long,
})  # fmt: skip
