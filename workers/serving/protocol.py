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
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: Boolean | None = None
    continuous_usage_stats: Boolean | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: Boolean | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is needed for the type json_schema")
        return self


class Body(BaseModel):
    """The fields that both kinds of requests share."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Number | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, Bias] | None = None
    max_tokens: Integer | None = Field(default=None, ge=1)
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
    # Known, and not honoured: each must be absent or without effect.
    prompt_logprobs: None = None
    bad_words: Annotated[Several[str], Field(max_length=0)] | None = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    use_beam_search: Literal[False] | None = None

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
        return self


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function"] = "function"
    function: NamedFunction


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call that the model made earlier; OpenAI writes its arguments as JSON in a string."""

    model_config = ConfigDict(extra="allow", frozen=True)

    function: CalledFunction

    @model_validator(mode="after")
    def check_arguments(self) -> Self:
        arguments = self.function.arguments
        try:
            json.loads(arguments or "{}") if isinstance(arguments, str) else None
        except (ValueError, RecursionError) as fault:
            raise ValueError(f"the arguments are not JSON: {json_fault(fault)}") from fault
        return self


class ChatMessage(BaseModel):
    """A turn; the chat template decides on roles and further keys."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | Several[TextPart] | None = None
    tool_calls: Several[ToolCall] | None = None


class ChatRequest(Body):
    messages: Several[ChatMessage] = Field(min_length=1)
    logprobs: Boolean | None = None
    top_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    tools: Several[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Boolean | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: Boolean = True
    continue_final_message: Boolean = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: None = None  # a template is code: only the model's own runs

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
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which tools lacks")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        return self


class CompletionRequest(Body):
    prompt: str | Tokens | Several[str] | Several[Tokens]
    logprobs: Integer | None = Field(default=None, ge=0, le=20)
    echo: Boolean = False
    add_special_tokens: Boolean = True
    suffix: Literal[""] | None = None
    best_of: Integer | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def accept_false(cls, value: Any) -> Any:
        """Takes false as in a chat: no logprobs."""
        return None if value is False else value

    @model_validator(mode="after")
    def check_combinations(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be absent or equal to n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: logprobs of prompts are not computed")
        return self

    @property
    def prompts(self) -> list[str | Tokens]:
        """Each prompt alone."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        single = [each for each in self.prompt if isinstance(each, int)]
        several = [each for each in self.prompt if not isinstance(each, int)]
        return [single] if single else [*several]
