"""A conversation as a prompt, and how its answer is to be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from app.core.errors import InvalidRequest, ModelRefused
from workers.serving.answer_forms import CALL_FORMS, AnswerForms
from workers.serving.answer_readers import (
    AnswerReader,
    CallListReader,
    CallNumbers,
    FormReader,
    NamedCallReader,
    PlainReader,
    call_id,
    specials_pattern,
)
from workers.serving.constraints import call_constraint, text_constraint
from workers.serving.protocol import ChatRequest, NamedTool
from workers.serving.served_model import Prompts, ServedModel
from workers.serving.tokenization import Tokenization
from workers.texts.chat_template import ChatTemplate, RefusedByTemplate

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def chat_prompts(served: ServedModel, request: ChatRequest) -> Prompts:
    """Renders and encodes; takes time, so it runs in a thread. Raises InvalidRequest."""
    template = template_of(served.tokenization)
    text = render(template, request)
    constraint = call_constraint(request) or text_constraint(request)
    reader = reader_of(served.tokenization, request, text, constrained=constraint is not None)
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    special = template.is_default or request.add_special_tokens
    ids = tuple(served.tokenization.encode(text, special_tokens=special))
    ids = served.checked(served.truncated(ids, request, limit), limit, "messages")
    return Prompts(
        [ids], limit, (request.top_logprobs or 0) if request.logprobs else None,
        served.matcher(constraint), reader=reader, reads_marks=reads_marks(reader),
    )  # fmt: skip


def template_of(tokenization: Tokenization) -> ChatTemplate:
    """Raises InvalidRequest if the model's chat template is invalid."""
    template = tokenization.template
    if isinstance(template, ModelRefused):
        raise InvalidRequest(
            template.message, code=template.code, param="messages",
            remedy="send text to /v1/completions, which needs no template, or correct the model's",
        )  # fmt: skip
    return template


def render(template: ChatTemplate, request: ChatRequest) -> str:
    """Raises InvalidRequest for messages that the model's template refuses or that break it."""
    variables = {
        key: value for key, value in (request.chat_template_kwargs or {}).items() if key not in RESERVED
    }
    if request.documents and "documents" not in template.source:
        raise InvalidRequest(
            "this model's chat template does not read documents",
            code="unsupported_parameter", param="documents", remedy="write them into a message",
        )  # fmt: skip
    # A template that does not read the effort is of a model that has none.
    fields = {"documents": request.documents, "reasoning_effort": request.reasoning_effort}
    variables |= {name: value for name, value in fields.items() if value}
    tools = [tool.model_dump(exclude_unset=True) for tool in request.offered]
    try:
        return template.render(
            [message.model_dump(exclude_unset=True) for message in request.messages],
            {**variables, "add_generation_prompt": request.add_generation_prompt},
            tools=tools or None,
            continue_final_message=request.continue_final_message,
        )
    except RefusedByTemplate as refusal:
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {refusal}",
            code="chat_template_refused", remedy="use roles and orders that the model knows",
            param="messages",
        ) from refusal  # fmt: skip


def reader_of(
    tokenization: Tokenization, request: ChatRequest, prompt: str, *, constrained: bool
) -> Callable[[], AnswerReader]:
    """Makes the reader of each choice. Raises InvalidRequest for calls in a form that is not known here."""
    forms, single = tokenization.forms, request.parallel_tool_calls is False
    short = forms.calls is not None and forms.calls.short_ids
    choice = request.choice_of_calls
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        return lambda: NamedCallReader(name, call_id(short=short))
    if choice == "required":
        return lambda: CallListReader(CallNumbers(short_ids=short, single=single))
    if choice == "auto":
        check_calls(forms, constrained=constrained)
    if constrained or (forms.reasoning is None and choice == "none"):
        return PlainReader
    tools = {tool.function.name: (tool.function.parameters or {}).get("properties") or {}
             for tool in request.offered}  # fmt: skip
    used = replace(forms, calls=forms.calls if tools else None)
    opening = forms.reasoning.opening if forms.reasoning else ""
    begun = opening if opening and prompt.rstrip().endswith(opening) else ""
    specials = None
    if request.skip_special_tokens:
        specials = specials_pattern(tokenization.special_tokens, used)
    return lambda: FormReader(used, tools, CallNumbers(short_ids=short, single=single), specials, begun)


def check_calls(forms: AnswerForms, *, constrained: bool) -> None:
    if forms.calls is None:
        names = ", ".join(form.name for form in CALL_FORMS)
        raise InvalidRequest(
            "this model's chat template has no form of tool calls that is known here "
            f"({names}), so a call that the model writes of its own accord can't be read",
            code="tool_form_unknown", param="tools",
            remedy="set tool_choice to required, to one tool, or to none; or deploy with engine: vllm "
            "and its option tool-call-parser",
        )  # fmt: skip
    if constrained:
        raise InvalidRequest(
            "a demand on the text leaves the model no way to call a tool",
            code="tools_with_constraint", param="tool_choice",
            remedy="set tool_choice to none or required, or leave response_format out",
        )  # fmt: skip


def reads_marks(reader: Callable[[], AnswerReader]) -> bool:
    """Whether special tokens have to stand in the text: marks of many families are such tokens."""
    return isinstance(reader(), FormReader)
