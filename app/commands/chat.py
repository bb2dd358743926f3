"""`nibble chat`: a conversation in the terminal, streamed as it is generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from app.commands.option_groups import option, without_none
from app.commands.short_ids import LAST, deployment_of
from app.commands.terminal import (
    ExitCode,
    Service,
    print_json,
    report_error,
    stderr,
    stdout,
)
from app.core.errors import NibbleError
from app.core.records.counted import counted

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import NibbleClient

HELP = """[dim]/new    forget the conversation      /system TEXT  set the system prompt
/undo   forget the last exchange    /set NAME VALUE  top_p, top_k, max_tokens, …
/help   this list                   /quit, Ctrl-D    leave      Ctrl-C  stop an answer[/]"""
# What /set takes: the type of a value, and its least and most.
PARAMETERS: dict[str, tuple[type[float] | type[int], float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 2**31),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 10),
    "max_tokens": (int, 1, 2**31),
    "seed": (int, -(2**63), 2**63 - 1),
}
SOURCES = {"model": "the model's own", "default": "Nibble's default: the model sets none"}


@dataclass(frozen=True)
class Pace:
    """How fast an answer came: its tokens, and the seconds after the first of them."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Pace) -> Pace:
        return Pace(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def tokens_per_s(self) -> float | None:
        """None where too little was heard to tell."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


@dataclass
class Conversation:
    """The messages of a conversation, and the request's parameters."""

    model: str
    parameters: dict[str, float | int] = field(default_factory=dict)
    system: str | None = None
    exchanges: list[dict[str, str]] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)  # of all answers

    def body(self) -> dict[str, Any]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*opening, *self.exchanges],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.parameters,
        }

    def say(self, text: str) -> None:
        self.exchanges.append({"role": "user", "content": text})

    def hear(self, text: str) -> None:
        self.exchanges.append({"role": "assistant", "content": text})

    def undo(self) -> None:
        """Forget the last question and its answer."""
        while self.exchanges and self.exchanges.pop()["role"] != "user":
            pass


@dataclass(frozen=True)
class SamplingOptions:
    """The options of an answer: fields of a request. What is None is left to the model."""

    temperature: Annotated[float | None, option("0 always picks the most likely token.", least=0)] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Sample from the most likely tokens of this total probability.",
            show_default=False,
        ),
    ] = None
    top_k: Annotated[int | None, option("Sample from this many of the most likely tokens.", least=0)] = None
    repetition_penalty: Annotated[float | None, option("Above 1 repeats less.", least=0.01)] = None
    max_tokens: Annotated[int | None, option("Maximum length of the answer, in tokens.", least=1)] = None
    seed: Annotated[int | None, option("Sampling seed; the same seed repeats the answer.")] = None


def chat(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A deployment's name, or `last`.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question; without it a conversation.", show_default=False),
    ] = None,
    *,
    system: Annotated[str | None, option("System prompt.")] = None,
    options: SamplingOptions,
    service: Service,
) -> None:
    """Chat with a deployment. With --json: one question, its answer as one document.

    Without options it is sampled as the model's generation_config.json asks, else at temperature 0.7.
    """
    if service.as_json and prompt is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "--json needs a question: there is no conversation in JSON", param_hint="PROMPT"
        )
    asked = without_none(asdict(options))
    console = stdout()
    with service.connect() as client:
        if name == LAST:
            name = deployment_of(client, name).name
        sampling = client.model(name).get("sampling") or {}
        parameters = {**sampling.get("parameters", {}), **asked}
        talk = Conversation(model=name, parameters=parameters, system=system)
        if prompt is not None or not sys.stdin.isatty():
            talk.say(prompt if prompt is not None else sys.stdin.read())
            if service.as_json:
                print_json(whole_answer(client, talk))
            else:
                answer(client, talk, console)
            return
        console.print(f"[bold]{escape(name)}[/] [dim]/help lists the commands[/]")
        console.print(f"[dim]{sampling_text(sampling, asked)}[/]")
        converse(client, talk, console)


def sampling_text(sampling: Mapping[str, Any], asked: Mapping[str, float | int]) -> str:
    """`temperature 0.7, top_p 0.95 (Nibble's default: the model sets none); seed 3 (yours)`."""
    rest = {name: value for name, value in sampling.get("parameters", {}).items() if name not in asked}
    origin = SOURCES.get(str(sampling.get("source")), "the server's")
    listed = [
        ", ".join(f"{name} {value:g}" for name, value in values.items()) + f" ({source})"
        for values, source in ((rest, origin), (asked, "yours"))
        if values
    ]
    return "; ".join(listed) or "sampling: the server's default"


def converse(
    client: NibbleClient,
    talk: Conversation,
    console: Console,
    *,
    beside: Callable[[Conversation], None] = lambda talk: None,
) -> None:
    """Alternate questions and answers until the input ends. `beside` sees each question before its answer."""
    while True:
        try:
            line = console.input("\n[bold cyan]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            command(talk, line, console)
        elif line:
            talk.say(line)
            try:
                beside(talk)
                console.print(f"[bold green]{escape(talk.model)}[/] ", end="")
                answer(client, talk, console)
            except NibbleError as error:
                talk.undo()
                if report_error(error) is ExitCode.UNREACHABLE:
                    return


def command(talk: Conversation, line: str, console: Console) -> None:
    word, _, rest = line.partition(" ")
    if word == "/new":
        talk.exchanges.clear()
        console.print("[dim]a new conversation[/]")
    elif word == "/undo":
        talk.undo()
        left = counted(len(talk.exchanges), "message")
        console.print(f"[dim]{left} left[/]")
    elif word == "/system":
        talk.system = rest or None
        console.print("[dim]noted[/]")
    elif word == "/set":
        set_parameter(talk, rest, console)
    else:
        if word != "/help":
            console.print(f"unknown command {escape(word)}")
        console.print(HELP)


def set_parameter(talk: Conversation, text: str, console: Console) -> None:
    """`NAME VALUE`, within the parameter's limits."""
    name, _, written = text.partition(" ")
    if name not in PARAMETERS:
        console.print(f"[dim]/set NAME VALUE, NAME one of {', '.join(PARAMETERS)}[/]")
        return
    kind, least, most = PARAMETERS[name]
    try:
        value = kind(written)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        bounds = f"of at least {least:g}" if most >= 2**31 else f"from {least:g} to {most:g}"
        number = "a whole number" if kind is int else "a number"
        console.print(f"{name} is {number} {bounds}, not {escape(written) or 'nothing'}")
        return
    talk.parameters[name] = value
    console.print(f"[dim]{name} is {value:g}[/]")


def answer(client: NibbleClient, talk: Conversation, console: Console) -> None:
    """Print the answer as it arrives, and add it to the conversation. Ctrl-C stops it and keeps the text."""
    texts: list[str] = []
    started, first, usage = time.monotonic(), 0.0, 0
    try:
        for chunk in client.chat(talk.body(), on_wait=lambda seconds: waiting(console, seconds)):
            usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
            for choice in chunk.get("choices", ()):
                text = (choice.get("delta") or {}).get("content") or ""
                if text:
                    first = first or time.monotonic()
                    texts.append(text)
                    console.print(escape(text), end="", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim]stopped[/]", end="")
    console.print()
    talk.hear("".join(texts))
    if not usage or not first:
        return
    pace = Pace(usage - 1, max(time.monotonic() - first, 1e-9))
    talk.pace += pace
    if console.is_terminal:
        rate = pace.tokens_per_s or 0.0
        console.print(
            f"[dim]{counted(usage, 'token')}, {rate:.1f} per second, first after {first - started:.2f} s[/]"
        )


def whole_answer(client: NibbleClient, talk: Conversation) -> dict[str, Any]:
    """The answer with its finish reason and token usage."""
    texts: list[str] = []
    document: dict[str, Any] = {
        "model": talk.model, "content": "", "finish_reason": None, "usage": None,
        "parameters": talk.parameters,
    }  # fmt: skip
    for chunk in client.chat(talk.body(), on_wait=lambda seconds: waiting(stderr(), seconds)):
        document["usage"] = chunk.get("usage") or document["usage"]
        for choice in chunk.get("choices", ()):
            texts.append((choice.get("delta") or {}).get("content") or "")
            document["finish_reason"] = choice.get("finish_reason") or document["finish_reason"]
    return {**document, "content": "".join(texts)}


def waiting(console: Console, seconds: float) -> None:
    if console.is_terminal:
        console.print(f"[dim]the model is loading; trying again in {seconds:.0f} s[/]")
