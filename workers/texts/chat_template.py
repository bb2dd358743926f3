"""Chat templates: from messages to the text that the model was trained on, for calibration and for serving.

A template comes with the model, never with a request, and runs in Jinja's immutable sandbox: it can call
nothing but what is listed here. What is listed is what transformers' `apply_chat_template` offers
(`transformers.utils.chat_template_utils`, 5.24), so that a template gives the same text here and there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase

from app.core.errors import ModelRefused

# For models without a template: each message as a line of its own.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DEFAULT, TOOL_USE = "default", "tool_use"
MAX_TEMPLATE = 256 * 1024
MAX_RENDERED = 8 * 1024**2  # characters beyond those of the messages
MAX_SECONDS = 5.0
MAX_POWER_BITS = 4096
# Behind the text that is to be continued. A template that strips its messages takes the space away.
END_OF_TEXT = "<<the answer goes on here>> "
PROBE = "Is this text written?"
NOTHING_GIVEN: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False}
REASONING = ("reasoning_content", "thinking", "reasoning")
# Errors that a template, which is a program, can raise.
FAULTS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip


class RefusedByTemplate(TemplateError):
    """A template refuses these messages, or exceeded a limit. Its text is the reason."""


class TimedSandbox(ImmutableSandboxedEnvironment):
    """Checks the time limit at every call of a template and every text that it writes.

    `range` ends at 100,000 in a sandbox, so a longer loop has to call it again.
    """

    intercepted_binops = frozenset({"**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._deadline = threading.local()

    def start(self) -> None:
        """From here on this thread's template has `MAX_SECONDS`."""
        self._deadline.at = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        if time.monotonic() > self._deadline.at:
            raise RefusedByTemplate(f"the template ran for longer than {MAX_SECONDS:g} s")

    def call(self, context: Any, called: Any, /, *arguments: Any, **options: Any) -> Any:
        self.check()
        return super().call(context, called, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A power is computed in one step, which nothing can end."""
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_POWER_BITS:
            raise RefusedByTemplate("the template computes a power that is too large")
        return super().call_binop(context, operator, left, right)


class GenerationBlocks(Extension):
    """`{% generation %}` marks what the model writes, for training; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PublicNamespace(Namespace):
    """`namespace()` without names that begin with an underscore, as in transformers."""

    def __init__(*arguments: Any, **attributes: Any) -> None:  # a template may name one of them `self`
        self, *mappings = arguments
        values = dict(*mappings, **attributes)
        for name in values:
            check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class NewDict:
    """`dict()` without the methods of the class, which would change a message: `dict.update(message, …)`."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[Any, Any]:
        return dict(*arguments, **options)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class ChatTemplate:
    """A model's compiled templates and the special tokens that they may name."""

    def __init__(self, sources: str | Mapping[str, str] | None, special_tokens: Mapping[str, Any]) -> None:
        """`sources`: one template, or several by name. Raises ModelRefused for one that is no template."""
        self.is_default = sources is None
        self._special_tokens = dict(special_tokens)
        self._environment = environment()
        named = sources if isinstance(sources, Mapping) else {DEFAULT: PLAIN if sources is None else sources}
        self._names = sorted(named)
        # Others can't be asked for, so that they need not be right.
        self._templates = {n: self._compiled(s) for n, s in named.items() if n in (DEFAULT, TOOL_USE)}
        self.source = "\n".join(str(named[name]) for name in self._templates)  # as the model has them
        self._in_parts = {name for name, template in self._templates.items() if self._wants_parts(template)}

    def _compiled(self, source: object) -> Template:
        if not isinstance(source, str):
            fault = f"is {type(source).__name__}, not text"
        elif len(source) > MAX_TEMPLATE:
            fault = f"has {len(source)} characters; {MAX_TEMPLATE} are allowed"
        else:
            try:
                return self._environment.from_string(source)
            except (TemplateError, SyntaxError, RecursionError, ValueError) as error:
                fault = f"can't be read: {error}"
        raise ModelRefused(
            f"the chat template {fault}", code="chat_template_invalid",
            remedy="correct it in the model's chat_template.jinja, chat_template.json or "
            "tokenizer_config.json, and submit the model again",
        )  # fmt: skip

    def _wants_parts(self, template: Template) -> bool:
        """Whether the template writes a text only if it is a list of parts, not a string."""

        def writes(content: Any) -> bool:
            try:
                return PROBE in self._written(template, [{"role": "user", "content": content}], {})
            except RefusedByTemplate:
                return False

        return not writes(PROBE) and writes(text_parts(PROBE))

    def render(
        self,
        messages: list[dict[str, Any]],
        arguments: Mapping[str, Any] = MappingProxyType({}),
        *,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation; `arguments` are further names that the template may use.

        `continue_final_message` ends the text within the last message.

        Raises RefusedByTemplate for messages that the template refuses or that break it.
        """
        name = self._chosen(tools)
        turns = [turn(message) for message in messages]
        last = turns[-1]["content"] if continue_final_message else ""
        if continue_final_message:
            turns[-1]["content"] = last + END_OF_TEXT
        if name in self._in_parts:
            turns = [message | {"content": text_parts(message["content"])} for message in turns]
        text = self._written(self._templates[name], turns, {**arguments, "tools": tools})
        return before_end(text, last) if continue_final_message else text

    def _chosen(self, tools: list[dict[str, Any]] | None) -> str:
        """As transformers chooses: the template for tools where there are tools, else the default one."""
        if tools is not None and TOOL_USE in self._templates:
            return TOOL_USE
        if DEFAULT not in self._templates:
            raise RefusedByTemplate(f"the model has the templates {self._names}, none of them the default")
        return DEFAULT

    def _written(self, template: Template, turns: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        self._environment.start()
        most = MAX_RENDERED + sum(len(str(message["content"])) for message in turns)
        values = {**NOTHING_GIVEN, **self._special_tokens, **arguments, "messages": turns}
        pieces, size = [], 0
        try:
            for text in template.generate(values):
                pieces.append(text)
                size += len(text)
                self._environment.check()
                if size > most:
                    raise RefusedByTemplate(f"the text is longer than {most} characters")
        except FAULTS as fault:
            raise RefusedByTemplate(str(fault) or type(fault).__name__) from fault
        return "".join(pieces)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Those of a loaded tokenizer, wherever its files hold them.

    That is `chat_template.jinja` with `additional_chat_templates/NAME.jinja`, or the one template or the list
    of named ones in tokenizer_config.json. Raises ModelRefused for one that is no template.
    """
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map)


def turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it, and vLLM gives it: text is a string, arguments are objects.

    OpenAI writes text in parts, arguments as JSON in a string, and null for the text of a call.
    """
    fields = {key: value for key, value in message.items() if value is not None}
    fields["content"] = joined(fields.get("content", ""))
    if isinstance(fields.get("tool_calls"), list):
        fields["tool_calls"] = [call_with_object(call) for call in fields["tool_calls"]]
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    if reasoning is not None:  # each family has its own name for it
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def joined(content: Any) -> Any:
    """Joins parts of text; leaves anything else to the template."""
    if not isinstance(content, list):
        return content
    texts = [item["text"] for item in content if isinstance(item, dict) and isinstance(item.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else content


def call_with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str | None):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}
    except (ValueError, RecursionError):
        return call


def text_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def before_end(text: str, last: str) -> str:
    """The text before the mark that was appended to the last message."""
    end = text.rfind(END_OF_TEXT.strip())
    if end < 0 or last.strip() not in text:
        raise RefusedByTemplate("the last message can't be continued: the template does not write all of it")
    whole = text.startswith(END_OF_TEXT, end)
    return text[:end] if whole else text[:end].rstrip()


def environment() -> TimedSandbox:
    """As in transformers, whose templates these are."""
    sandbox = TimedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols], autoescape=False
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": refuse, "strftime_now": strftime_now, "dict": NewDict(),
        "namespace": PublicNamespace,
    }  # fmt: skip
    return sandbox


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's own escapes for HTML; the arguments are those of transformers, in its order."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise RefusedByTemplate(f"a namespace can't hold the name {name!r}")


def refuse(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def strftime_now(pattern: str) -> str:
    """By the clock and the zone of this machine, as in transformers."""
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # the zone is the machine's on purpose
