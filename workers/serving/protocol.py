"""The bodies of requests, as OpenAI documents them and vLLM extends them.

Fields that are not known are accepted and logged: clients send ever new ones. Fields that are known but
can't be honoured are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator, model_validator

from app.core.sources.json_file import json_fault

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20  # alternatives to a token


def not_boolean(value: Any) -> Any:
    """JSON has numbers and booleans; Python, and pydantic with it, takes true for 1 and false for 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")  # noqa: TRY004  # pydantic's way to refuse
    return value


def no_booleans(value: Any) -> Any:
    """The same for a list, without a call for each of its items."""
    if isinstance(value, list) and bool in map(type, value):
        raise ValueError("numbers are needed, not true or false")
    return value


T = TypeVar("T")
Boolean = Annotated[bool, Strict()]  # pydantic takes 1, "yes" and "off" for one
Integer = Annotated[int, BeforeValidator(not_boolean)]
Number = Annotated[float, BeforeValidator(not_boolean)]
# Only the first fault is reported. A body with a million of them would take gigabytes to describe.
Several = Annotated[list[T], Field(fail_fast=True)]
Tokens = Annotated[Several[int], BeforeValidator(no_booleans)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Pattern = Annotated[str, Field(min_length=1, max_length=2**20)]
Choices = Annotated[Several[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]


class Received(BaseModel):
    """What a caller sends, or a level of it: further fields are accepted, and looked at elsewhere."""

    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(Received):
    include_usage: Boolean | None = None
    continuous_usage_stats: Boolean | None = None


class JsonSchema(Received):
    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: Boolean | None = None


class ResponseFormat(Received):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is needed for the type json_schema")
        return self


class StructuredOutputs(Received):
    """vLLM's; a field of it that is not here is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_document: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: Boolean | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None


class Body(Received):
    """The fields that both kinds of requests share."""

    model: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Number | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, Bias] | None = None
    max_tokens: Integer | None = Field(default=None, ge=0)  # 0: the prompt is read, and nothing written
    n: Integer | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: Integer | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[Several[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(default=None, ge=0, le=100)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: Integer | None = Field(default=None, ge=-1, lt=2**31)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    response_format: ResponseFormat | None = None
    stop_token_ids: Tokens | None = None
    allowed_token_ids: Annotated[Tokens, Field(min_length=1)] | None = None
    include_stop_str_in_output: Boolean = False
    ignore_eos: Boolean = False
    min_tokens: Integer = Field(default=0, ge=0)
    skip_special_tokens: Boolean = True
    user: str | None = None
    prompt_logprobs: Integer | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: Boolean | None = None
    return_tokens_as_token_ids: Boolean | None = None
    truncate_prompt_tokens: Integer | None = Field(default=None, ge=-1, lt=2**63)
    truncation_side: Literal["left", "right"] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    best_of: Integer | None = None

    @property
    def scored(self) -> int | None:
        """How many alternatives to each token of the prompt are asked for; None: no scores."""
        return self.prompt_logprobs

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is only allowed when stream is false")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be absent or equal to n")
        return self


class ToolFunction(Received):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Boolean | None = None


class Tool(Received):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Received):
    name: str


class NamedTool(Received):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Received):
    mode: Literal["auto", "required"]
    tools: Several[NamedTool] = Field(min_length=1)


class AllowedChoice(Received):
    """A choice among some of the tools; in older clients its fields stand beside `type`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TextPart(Received):
    type: Literal["text"]
    text: str


class CalledFunction(Received):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Received):
    """A call that the model made earlier; OpenAI writes its arguments as JSON in a string."""

    function: CalledFunction

    @model_validator(mode="after")
    def check_arguments(self) -> Self:
        arguments = self.function.arguments
        try:
            json.loads(arguments or "{}") if isinstance(arguments, str) else None
        except (ValueError, RecursionError) as fault:
            raise ValueError(f"the arguments are not JSON: {json_fault(fault)}") from fault
        return self


class ChatMessage(Received):
    """A turn; the chat template decides on roles and further keys."""

    role: str = Field(min_length=1, max_length=64)
    content: str | Several[TextPart] | None = None
    tool_calls: Several[ToolCall] | None = None


class ChatRequest(Body):
    messages: Several[ChatMessage] = Field(min_length=1)
    logprobs: Boolean | None = None
    top_logprobs: Integer | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    tools: Several[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: Boolean | None = None
    reasoning_effort: str | None = None
    include_reasoning: Boolean = True
    documents: Several[dict[str, Any]] | None = None
    add_generation_prompt: Boolean = True
    add_special_tokens: Boolean = False  # a template writes its own
    continue_final_message: Boolean = False
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        tools: list[Tool] = self.tools or []
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, AllowedChoice):
            allowed = {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
            return [tool for tool in tools if tool.function.name in allowed]
        return tools

    @property
    def choice_of_calls(self) -> str:
        """`none`, `auto`, `required`, or `named`."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return "named"
        if not self.offered:
            return "none"
        return choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice or "auto"

    @model_validator(mode="after")
    def check_combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.continue_final_message and (
            self.add_generation_prompt or self.messages[-1].role != "assistant"
        ):
            raise ValueError(
                "continue_final_message needs add_generation_prompt to be false and a last assistant message"
            )
        names = {tool.function.name for tool in self.tools or ()}
        chosen: list[NamedTool] = []
        if isinstance(self.tool_choice, NamedTool):
            chosen = [self.tool_choice]
        elif isinstance(self.tool_choice, AllowedChoice):
            chosen = self.tool_choice.allowed_tools.tools
        for tool in chosen:
            if tool.function.name not in names:
                raise ValueError(f"tool_choice names {tool.function.name!r}, which tools lacks")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        return self


class CompletionRequest(Body):
    prompt: str | Tokens | Several[str] | Several[Tokens]
    logprobs: Integer | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: Boolean = False
    add_special_tokens: Boolean = True
    suffix: Literal[""] | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def accept_false(cls, value: Any) -> Any:
        """Takes false as in a chat: no logprobs."""
        return None if value is False else value

    @property
    def scored(self) -> int | None:
        """How many alternatives to each token of the prompt are asked for; None: no scores."""
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None)
                 if count is not None]  # fmt: skip
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | Tokens]:
        """Each prompt alone."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        single = [each for each in self.prompt if isinstance(each, int)]
        several = [each for each in self.prompt if not isinstance(each, int)]
        return [single] if single else [*several]
