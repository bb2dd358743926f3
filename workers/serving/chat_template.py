"""Chat templates: from messages to the text that the model was trained on.

A template comes with the model, never with a request, and runs in Jinja's immutable sandbox: it can call
nothing but what is listed here.
"""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.core.errors import InvalidRequest, ModelRefused

# For models without a template: each message as a line of its own.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MAX_TEMPLATE = 256 * 1024
MAX_RENDERED = 8 * 1024**2


MAX_SECONDS = 5.0


class RefusedByTemplate(TemplateError):
    """What a template raises for messages that it can't hold."""


class TimedSandbox(ImmutableSandboxedEnvironment):
    """Every call that a template makes, and every piece that it writes, is a chance to end it.

    `range` ends at 100,000 in a sandbox, so a longer loop has to call it again.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._deadline = threading.local()

    def start(self) -> None:
        """From here on this thread's template has `MAX_SECONDS`."""
        self._deadline.at = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        if time.monotonic() > self._deadline.at:
            raise RefusedByTemplate(f"the template ran for longer than {MAX_SECONDS:g} s")

    def call(self, *arguments: Any, **options: Any) -> Any:
        self.check()
        return super().call(*arguments, **options)


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        """Raises ModelRefused for a template that is no template."""
        if source is not None and len(source) > MAX_TEMPLATE:
            raise ModelRefused(
                f"the chat template has {len(source)} characters; {MAX_TEMPLATE} are allowed",
                code="chat_template_invalid", remedy="shorten chat_template.jinja",
            )  # fmt: skip
        self.is_default = source is None
        self._special_tokens = special_tokens
        self._environment = environment()
        try:
            self._template: Template = self._environment.from_string(PLAIN if source is None else source)
        except TemplateError as fault:
            raise ModelRefused(
                f"the chat template can't be read: {fault}",
                code="chat_template_invalid", remedy="correct chat_template.jinja",
            ) from fault  # fmt: skip

    def render(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """Raises InvalidRequest for messages that the template refuses or that break it."""
        self._environment.start()
        try:
            pieces, size = [], 0
            for piece in self._template.generate(messages=messages, **self._special_tokens, **arguments):
                pieces.append(piece)
                size += len(piece)
                self._environment.check()
                if size > MAX_RENDERED:
                    raise RefusedByTemplate(f"the text is longer than {MAX_RENDERED} characters")
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            TypeError,
            ValueError,
        ) as fault:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {fault}",
                code="chat_template_refused", remedy="use roles and orders that the model knows",
                param="messages",
            ) from fault  # fmt: skip
        return "".join(pieces)


def environment() -> TimedSandbox:
    """As in transformers, whose templates these are."""
    made = TimedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = strftime_now
    return made


def tojson(value: Any, indent: int | None = None) -> str:
    """Without Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def strftime_now(pattern: str) -> str:
    return datetime.now(UTC).strftime(pattern)
