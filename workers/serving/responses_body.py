"""The body of /v1/responses as a conversation: OpenAI's newer contract is translated, not served on its own.

Nothing is stored: every request brings its whole conversation, as `store: false` does at OpenAI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from app.core.errors import InvalidRequest
from workers.serving.protocol import Boolean, ChatRequest, Integer, Number, Received, Several
from workers.serving.unsupported import LEAVE_OUT, Unsupported, refuse_fields

STATELESS = "send the whole conversation as input: nothing is stored here"
REFUSED: Mapping[str, Unsupported] = {
    "background": Unsupported("wait for the answer, or stream it", (False,)),
    "context_management": Unsupported(LEAVE_OUT, ([],)),
    "conversation": Unsupported(STATELESS),
    "max_tool_calls": Unsupported("set parallel_tool_calls to false"),
    "previous_response_id": Unsupported(STATELESS),
    "prompt": Unsupported("send the text as instructions and input"),
    "truncation": Unsupported("shorten the input", ("disabled",)),
}
LOGPROBS = "message.output_text.logprobs"
INCLUDED = ("reasoning.encrypted_content", LOGPROBS)  # the first: reasoning is sent as it is
SAME = ("model", "stream", "temperature", "top_p", "user", "parallel_tool_calls", "seed", "top_k", "min_p",
        "chat_template_kwargs", "ignore_eos", "stop", "repetition_penalty")  # fmt: skip


class TextFormat(Received):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: Boolean | None = None


class TextOptions(Received):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Received):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Received):
    """What is read of a body; the rest is refused, or has no effect."""

    model: str | None = None
    input: str | Several[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(default=None, ge=1)
    metadata: dict[str, str] | None = None
    parallel_tool_calls: Boolean | None = None
    reasoning: Reasoning | None = None
    stream: Boolean | None = None
    temperature: Number | None = Field(default=None, ge=0, le=100)
    text: TextOptions | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: Several[dict[str, Any]] | None = None
    top_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    user: str | None = None
    include: Annotated[Several[str], Field()] | None = None

    def to_chat(self) -> ChatRequest:
        """The same conversation. Raises InvalidRequest, or pydantic's error with the fields of a chat."""
        extras = self.model_extra or {}
        refuse_fields(extras, REFUSED)
        for name in self.include or ():
            if name not in INCLUDED:
                raise InvalidRequest(f"include can't be {name!r}", param="include", remedy="leave it out")
        chat: dict[str, Any] = {name: value for name in SAME if (value := self.sent(name)) is not None}
        chat |= {name: value for name, value in extras.items() if name not in REFUSED and name not in chat}
        chat |= {"messages": list(self.messages()), "tools": self.chat_tools() or None}
        chat |= {"tool_choice": chosen(self.tool_choice), "response_format": self.response_format()}
        if self.max_output_tokens is not None:
            chat["max_completion_tokens"] = self.max_output_tokens
        if self.reasoning is not None and self.reasoning.effort is not None:
            chat["reasoning_effort"] = self.reasoning.effort
        if self.top_logprobs is not None or LOGPROBS in (self.include or ()):
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        chat.pop("stream_options", None)
        return ChatRequest.model_validate(chat)

    def sent(self, name: str) -> Any:
        return getattr(self, name, None)

    def messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        yield from joined_turns(message_of(item, index) for index, item in enumerate(self.input))

    def chat_tools(self) -> list[dict[str, Any]]:
        tools = []
        for index, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                raise InvalidRequest(
                    f"tools of type {tool.get('type')!r} are not run here", param=f"tools.{index}.type",
                    remedy="send tools of type function, which your own program runs",
                )  # fmt: skip
            tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
        return tools

    def response_format(self) -> dict[str, Any] | None:
        format = self.text.format if self.text else None
        if format is None or format.type != "json_schema":
            return None if format is None else {"type": format.type}
        described = {"name": format.name, "schema": format.json_schema, "strict": format.strict}
        return {"type": "json_schema", "json_schema": described}


def chosen(choice: str | dict[str, Any] | None) -> Any:
    """tool_choice as a chat has it: names stand one level deeper there."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        tools = [chosen(tool) for tool in choice.get("tools") or ()]
        return {
            "type": "allowed_tools",
            "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools},
        }
    raise InvalidRequest(
        f"tool_choice of type {choice.get('type')!r} is not known here", param="tool_choice",
        remedy="use none, auto, required, function or allowed_tools",
    )  # fmt: skip


def message_of(item: dict[str, Any], index: int) -> dict[str, Any]:
    """An item of the input as a message of a chat."""
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": text_of(item.get("content"), f"input.{index}.content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = text_of(item.get("output"), f"input.{index}.output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    if kind == "reasoning":
        texts = [each.get("text", "") for each in item.get("content") or item.get("summary") or ()]
        return {"role": "assistant", "content": None, "reasoning_content": "\n".join(texts)}
    raise InvalidRequest(
        f"items of type {kind!r} are not read here", param=f"input.{index}.type",
        remedy="send items of type message, function_call, function_call_output or reasoning",
    )  # fmt: skip


def text_of(content: Any, param: str) -> Any:
    """Content as text, or as a chat's parts of text. Raises InvalidRequest for images and files."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, each in enumerate(content):
        kind = each.get("type") if isinstance(each, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise InvalidRequest(
                f"content of type {kind!r} is not read here", param=f"{param}.{index}.type",
                remedy="text is all that is read here",
            )  # fmt: skip
        texts.append({"type": "text", "text": each.get("text", each.get("refusal"))})
    return texts


def joined_turns(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Neighbouring items of the assistant as one turn, as templates expect it: reasoning, text, calls."""
    turn: dict[str, Any] | None = None
    for message in messages:
        if message["role"] != "assistant":
            if turn is not None:
                yield turn
            turn = None
            yield message
        elif turn is None or (turn.get("content") and message.get("content")):
            if turn is not None:
                yield turn
            turn = message
        else:
            calls = [*turn.get("tool_calls", []), *message.get("tool_calls", [])]
            content = turn.get("content") or message.get("content")
            turn = {**turn, **message, "content": content} | ({"tool_calls": calls} if calls else {})
    if turn is not None:
        yield turn
