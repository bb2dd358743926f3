"""langchain-openai: chats, batches, tools, structured output, completions, Responses."""

from __future__ import annotations

from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from rows import ABSENT, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

OPTIONS: Any = {"base_url": SCENE.base, "api_key": SCENE.key, "temperature": 0, "max_retries": 0}
llm = ChatOpenAI(model=SCENE.model, **OPTIONS)


class City(BaseModel):
    """A city."""

    city: Literal["Rome", "Oslo"] = Field(description="its name")


@tool
def visit(city: Literal["Rome", "Oslo"]) -> str:
    """Visits a city."""
    return "Sunny"


def chat() -> None:
    answer = llm.invoke(QUESTION)
    same(answer.content, SCENE.said)
    assert answer.usage_metadata["output_tokens"] > 0  # type: ignore[index]
    same([each.content for each in llm.batch([QUESTION, QUESTION])], [SCENE.said] * 2)


def stream() -> None:
    same("".join(str(each.content) for each in llm.stream(QUESTION)), SCENE.said)


async def from_event_loop() -> None:
    same("".join([str(each.content) async for each in llm.astream(QUESTION)]), SCENE.said)


def completions() -> None:
    texts = OpenAI(model=SCENE.model, max_tokens=30, **OPTIONS).batch(["Say:", "Read the result:"])
    same([each.strip() for each in texts], [SCENE.said, SCENE.after])


def calls(choice: str) -> Any:
    return llm.bind_tools([visit], tool_choice=choice).invoke(QUESTION).tool_calls[0]


def tools_auto() -> None:
    call = calls("auto")
    same({"name": call["name"], "arguments": call["args"]}, SCENE.called)


def tools_required() -> None:
    assert calls("any")["args"]["city"] in ("Rome", "Oslo")


def tools_named() -> None:
    assert calls("visit")["args"]["city"] in ("Rome", "Oslo")


def tool_results() -> None:
    bound = llm.bind_tools([visit])
    first: Any = bound.invoke(QUESTION)
    result = ToolMessage(visit.invoke(first.tool_calls[0]["args"]), tool_call_id=first.tool_calls[0]["id"])
    same(bound.invoke([HumanMessage(QUESTION), first, result]).content, SCENE.after)


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(llm.with_structured_output(City, method=method).invoke(QUESTION), City)
    strict = llm.with_structured_output(City, method="json_schema", strict=True)
    assert isinstance(strict.invoke(QUESTION), City)


def responses() -> None:
    other = ChatOpenAI(model=SCENE.model, use_responses_api=True, **OPTIONS)
    same(other.invoke(QUESTION).text, SCENE.said)
    same("".join(each.text for each in other.stream(QUESTION)), SCENE.said)


def responses_tools() -> None:
    other = ChatOpenAI(model=SCENE.model, use_responses_api=True, **OPTIONS)
    call = other.bind_tools([visit]).invoke(QUESTION).tool_calls[0]
    same({"name": call["name"], "arguments": call["args"]}, SCENE.called)


def embeddings() -> None:
    options: Any = {"base_url": SCENE.base, "api_key": SCENE.key, "check_embedding_ctx_length": False}
    OpenAIEmbeddings(model=SCENE.model, max_retries=0, **options).embed_query("a")


def unknown_model() -> None:
    ChatOpenAI(model=ABSENT, **OPTIONS).invoke(QUESTION)


def wrong_key() -> None:
    ChatOpenAI(model=SCENE.model, **{**OPTIONS, "api_key": WRONG_KEY}).invoke(QUESTION)


def too_long() -> None:
    llm.invoke(TOO_LONG)


report("langchain-openai", (openai.APIStatusError,), {
    "chat": chat, "stream": stream, "event loop": from_event_loop, "completions": completions,
    "tools: auto": tools_auto, "tools: required": tools_required, "tools: named": tools_named,
    "tool results": tool_results, "structured": structured, "responses": responses,
    "responses: tools": responses_tools, "embeddings": embeddings, "unknown model": unknown_model,
    "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
