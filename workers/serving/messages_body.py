"""The body of /v1/messages, Anthropic's contract, as a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from app.core.errors import InvalidRequest
from workers.serving.protocol import Boolean, ChatRequest, Integer, Number, Received, Several
from workers.serving.unsupported import ONLY_TEXT, Unsupported, refuse_fields

REFUSED: Mapping[str, Unsupported] = {
    "container": Unsupported("run code in your own program, as a tool"),
    "context_management": Unsupported("send the messages that are to be read"),
    "mcp_servers": Unsupported("call them from your own program, as tools", ([],)),
}
SAME = ("model", "stream", "temperature", "top_p", "top_k")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class AnthropicTool(Received):
    name: str = Field(min_length=1, max_length=256)
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: Boolean | None = None


class AnthropicChoice(Received):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Boolean = False


class AnthropicTurn(Received):
    role: Literal["user", "assistant", "system"]
    content: str | Several[dict[str, Any]]


class OutputFormat(Received):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Received):
    format: OutputFormat | None = None
    effort: str | None = None


class Thinking(Received):
    """`budget_tokens` is a limit that `max_tokens` stands for here."""

    type: Literal["enabled", "disabled", "adaptive"]


class CountRequest(Received):
    """What counts among the tokens of a prompt."""

    model: str | None = None
    messages: Several[AnthropicTurn] = Field(min_length=1)
    system: str | Several[dict[str, Any]] | None = None
    tools: Several[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None

    def to_chat(self) -> ChatRequest:
        """The same conversation. Raises InvalidRequest, or pydantic's error with the fields of a chat."""
        return ChatRequest.model_validate(self.fields())

    def fields(self) -> dict[str, Any]:
        refuse_fields(self.model_extra or {}, REFUSED)
        messages = list(self.chat_messages())
        tools = [chat_tool(tool) for tool in self.tools or ()]
        chat: dict[str, Any] = {"model": self.model, "messages": messages, "tools": tools or None}
        if self.tool_choice is not None:
            named = {"type": "function", "function": {"name": self.tool_choice.name}}
            chat["tool_choice"] = CHOICES.get(self.tool_choice.type, named)
            chat["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            chat["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
        if messages[-1]["role"] == "assistant":  # the answer begins with it
            chat |= {"add_generation_prompt": False, "continue_final_message": True}
        return chat

    def chat_messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": text_of(self.system, "system")}
        for index, turn in enumerate(self.messages):
            if isinstance(turn.content, str):
                yield {"role": turn.role, "content": turn.content}
            else:
                yield from messages_of(turn.role, turn.content, f"messages.{index}.content")


class MessagesRequest(CountRequest):
    max_tokens: Integer = Field(ge=1)
    stop_sequences: Annotated[Several[str], Field(max_length=16)] | None = None
    stream: Boolean | None = None
    temperature: Number | None = Field(default=None, ge=0, le=100)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: Integer | None = Field(default=None, ge=-1, lt=2**31)
    output_config: OutputConfig | None = None

    def fields(self) -> dict[str, Any]:
        chat = super().fields()
        chat |= {name: value for name in SAME if (value := getattr(self, name)) is not None}
        chat |= {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences or None}
        config = self.output_config
        if config is not None and config.format is not None:
            described = {"name": "answer", "schema": config.format.json_schema, "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": described}
        if config is not None and config.effort is not None:
            chat["reasoning_effort"] = config.effort
        return chat


def chat_tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    function |= {} if tool.strict is None else {"strict": tool.strict}
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


def messages_of(role: str, blocks: list[dict[str, Any]], param: str) -> Iterator[dict[str, Any]]:
    """The blocks of a turn: results of tools are messages of their own, and come first."""
    texts: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": role, "content": None}
    for index, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_result":
            content = text_of(block.get("content") or "", f"{param}.{index}.content")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            call = {"id": block.get("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(
                block.get("thinking", "")
            )
        elif kind != "redacted_thinking":
            texts += text_of([block], param)
    if texts:
        message["content"] = texts
    if len(message) > 2 or texts:
        yield message


def text_of(content: Any, param: str) -> Any:
    """Text, or blocks of text as a chat's parts. Raises InvalidRequest for images and documents."""
    if not isinstance(content, list):
        return content
    for index, block in enumerate(content):
        if block.get("type") != "text":
            raise InvalidRequest(
                f"content of type {block.get('type')!r} is not read here",
                param=f"{param}.{index}.type", remedy=ONLY_TEXT,
            )  # fmt: skip
    return [{"type": "text", "text": block.get("text")} for block in content]
