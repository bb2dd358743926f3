"""LlamaIndex' OpenAILike: chats, streams, tools, records, completions."""

# Without annotations from the future: the client reads those of `visit`.
from typing import Any, Literal

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from rows import ABSENT, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

MESSAGES = [ChatMessage(role="user", content=QUESTION)]


class City(BaseModel):
    """A city."""

    city: Literal["Rome", "Oslo"]


def visit(city: Literal["Rome", "Oslo"]) -> str:
    """Visits a city."""
    return "Sunny"


def llm_with(**changes: Any) -> OpenAILike:
    options = {
        "model": SCENE.model, "api_base": SCENE.base, "api_key": SCENE.key, "is_chat_model": True,
        "is_function_calling_model": True, "temperature": 0, "max_retries": 0, "context_window": 2048,
        **changes,
    }  # fmt: skip
    return OpenAILike(**options)


llm = llm_with()


def chat() -> None:
    same(llm.chat(MESSAGES).message.content, SCENE.said)


def stream() -> None:
    same("".join(each.delta or "" for each in llm.stream_chat(MESSAGES)), SCENE.said)


async def from_event_loop() -> None:
    same((await llm_with().achat(MESSAGES)).message.content, SCENE.said)


def completions() -> None:
    other = llm_with(is_chat_model=False, max_tokens=30)
    same(other.complete("Say:").text.strip(), SCENE.said)
    same("".join(each.delta or "" for each in other.stream_complete("Say:")).strip(), SCENE.said)


def calls(**options: Any) -> Any:
    answer = llm.chat_with_tools([FunctionTool.from_defaults(visit)], user_msg=QUESTION, **options)
    return llm.get_tool_calls_from_response(answer)[0]


def tools_auto() -> None:
    call = calls()
    same({"name": call.tool_name, "arguments": call.tool_kwargs}, SCENE.called)


def tools_required() -> None:
    assert calls(tool_required=True).tool_kwargs["city"] in ("Rome", "Oslo")


def structured() -> None:
    assert isinstance(llm.as_structured_llm(City).chat(MESSAGES).raw, City)


def unknown_model() -> None:
    llm_with(model=ABSENT).chat(MESSAGES)


def wrong_key() -> None:
    llm_with(api_key=WRONG_KEY).chat(MESSAGES)


def too_long() -> None:
    llm.chat([ChatMessage(role="user", content=TOO_LONG)])


report("llama-index-llms-openai-like", (openai.APIStatusError,), {
    "chat": chat, "stream": stream, "event loop": from_event_loop, "completions": completions,
    "tools: auto": tools_auto, "tools: required": tools_required, "structured": structured,
    "unknown model": unknown_model, "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
