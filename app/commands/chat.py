"""`nibble chat`: a conversation in the terminal, streamed as it is generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from app.commands.terminal import (
    ApiKey,
    AsJson,
    ExitCode,
    Url,
    connect,
    print_json,
    report_error,
    stderr,
    stdout,
)
from app.core.errors import NibbleError

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import NibbleClient

HELP = """[dim]/new    forget the conversation      /system TEXT  set the system prompt
/undo   forget the last exchange    /set NAME VALUE  top_p, top_k, max_tokens, …
/help   this list                   /quit, Ctrl-D    leave      Ctrl-C  stop an answer[/]"""
PARAMETERS = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
    "max_tokens": int, "seed": int,
}  # fmt: skip
SOURCES = {"model": "the model's own", "default": "the usual: the model names none"}


@dataclass
class Conversation:
    """The messages of a conversation, and the request's parameters."""

    model: str
    parameters: dict[str, float | int] = field(default_factory=dict)
    system: str | None = None
    exchanges: list[dict[str, str]] = field(default_factory=list)

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


def chat(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A deployment's name.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question; without it a conversation.", show_default=False),
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 always picks the likeliest token.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Choose among this share of likely tokens.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Choose among so many likeliest tokens.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Above 1: repeat less.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Sampling seed; the same seed repeats the answer.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Chat with a deployment. With --json: one question, its answer as one document.

    Without options it is sampled as the model's generation_config.json asks, else at temperature 0.7.
    """
    if as_json and prompt is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "--json needs a question: there is no conversation in JSON", param_hint="PROMPT"
        )
    options = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "repetition_penalty": repetition_penalty, "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    asked = {key: value for key, value in options.items() if value is not None}
    console = stdout()
    with connect(url, api_key) as client:
        sampling = client.model(name).get("sampling") or {}
        parameters = {**sampling.get("parameters", {}), **asked}
        talk = Conversation(model=name, parameters=parameters, system=system)
        if prompt is not None or not sys.stdin.isatty():
            talk.say(prompt if prompt is not None else sys.stdin.read())
            if as_json:
                print_json(whole_answer(client, talk))
            else:
                answer(client, talk, console)
            return
        console.print(f"[bold]{escape(name)}[/] [dim]/help lists the commands[/]")
        console.print(f"[dim]{sampling_text(sampling, asked)}[/]")
        converse(client, talk, console)


def sampling_text(sampling: Mapping[str, Any], asked: Mapping[str, float | int]) -> str:
    """`temperature 0.7, top_p 0.95 (the usual: the model names none); seed 3 (yours)`."""
    rest = {name: value for name, value in sampling.get("parameters", {}).items() if name not in asked}
    origin = SOURCES.get(str(sampling.get("source")), "the server's")
    listed = [
        ", ".join(f"{name} {value:g}" for name, value in values.items()) + f" ({source})"
        for values, source in ((rest, origin), (asked, "yours"))
        if values
    ]
    return "; ".join(listed) or "sampled as the server does by itself"


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
        console.print(f"[dim]{len(talk.exchanges)} messages are left[/]")
    elif word == "/system":
        talk.system = rest or None
        console.print("[dim]noted[/]")
    elif word == "/set":
        set_parameter(talk, rest, console)
    else:
        console.print(HELP)


def set_parameter(talk: Conversation, text: str, console: Console) -> None:
    name, _, value = text.partition(" ")
    try:
        talk.parameters[name] = PARAMETERS[name](value)
    except (KeyError, ValueError):
        console.print(f"[dim]/set NAME VALUE, NAME one of {', '.join(PARAMETERS)}[/]")
    else:
        console.print(f"[dim]{name} is {talk.parameters[name]:g}[/]")


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
    if console.is_terminal and usage and first:
        rate = (usage - 1) / max(time.monotonic() - first, 1e-9)
        console.print(f"[dim]{usage} tokens, {rate:.1f} per second, first after {first - started:.2f} s[/]")


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
        console.print(f"[dim]it is loading; asking again in {seconds:.0f} s[/]")
