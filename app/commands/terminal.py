"""Exit codes, consoles, service options and error output, shared by all commands.

Commands import slow modules (httpx, the web framework) in their bodies, so that `nibble --help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.clean_console import CleanConsole, printable
from app.commands.remedies import OPTION_OF_FIELD, in_terminal_words, with_options
from app.commands.tables import WholeTable
from app.core.errors import Conflict, InvalidRequest, NibbleError, field_fault

if TYPE_CHECKING:
    from app.client import NibbleClient
    from app.core.records.job import Problem
    from app.core.settings import Settings

PIPE_WIDTH = 200  # width of tables outside a terminal, where COLUMNS is not set


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1  # the job failed, or the service refused the request
    USAGE = 2  # the command line is wrong
    UNREACHABLE = 3  # no service answers
    INTERRUPTED = 130  # Ctrl-C


Url = Annotated[
    str | None, typer.Option("--url", envvar="NIBBLE_URL", help="Address of the service.", show_default=False)
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="NIBBLE_API_KEY",
        help="API key. Default: the one stored by `nibble up` on this machine.",
        show_default=False,
    ),
]
Limit = Annotated[int, typer.Option(min=1, max=100, help="Entries to list, newest first.")]
After = Annotated[
    str | None, typer.Option(help="Cursor printed below the previous page.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


@dataclass(frozen=True)
class Service:
    """The options of every command that asks a service."""

    as_json: AsJson = False
    url: Url = None
    api_key: ApiKey = None

    def connect(self) -> NibbleClient:
        return connect(self.url, self.api_key)

    @property
    def console(self) -> Console:
        """Where people follow what happens: apart from the JSON, if that is asked for."""
        return stderr() if self.as_json else stdout()


def stdout() -> Console:
    return console_on(stderr=False)


def stderr() -> Console:
    return console_on(stderr=True)


def console_on(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # rich follows COLUMNS by itself where it is set.
    width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdecimal() else PIPE_WIDTH
    return CleanConsole(stderr=stderr, width=width, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print one JSON document on one line, so that several form JSON lines."""
    sys.stdout.write(json.dumps(document, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def table(*columns: str, title: str | None = None, turns: bool = False) -> WholeTable:
    """A table. `>` before a heading aligns to the right, `!` keeps cells in one line, `?` may be left out."""
    return WholeTable(columns, title, turns=turns)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost; ends the command unless the answer is yes.

    Raises Conflict where nobody can be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Conflict(
            f"{question.rstrip('?')}: can't ask for confirmation: standard input is not a terminal",
            code="confirmation_needed",
            remedy="add --yes",
        )
    typer.confirm(printable(question), abort=True, err=True)


def report_error(error: NibbleError, *, as_json: bool = False, typed: Sequence[str] = ()) -> ExitCode:
    """Print an error with its code and remedy to stderr; returns its exit code."""
    code = ExitCode.UNREACHABLE if error.code == "service_unreachable" else ExitCode.FAILED
    remedy = in_terminal_words(error.code, error.remedy)
    if as_json:
        document = {
            "code": error.code,
            "message": error.message,
            "remedy": remedy,
            "param": error.param,
        }
        sys.stderr.write(json.dumps({"error": document}, separators=(",", ":")) + "\n")
        return code
    show_fault(stderr(), error, typed)
    return code


def option_of(param: str, typed: Sequence[str]) -> str:
    """The option that sets a field of a body or query; of a field without one its name."""
    field = ".".join(step for step in param.split(".") if not step.isdecimal())  # of a list's entry: the list
    option = "--" + field.partition(".")[0].replace("_", "-")
    is_typed = any(word.partition("=")[0] == option for word in typed)
    return OPTION_OF_FIELD.get(field, option if is_typed else param)


def show_fault(console: Console, fault: NibbleError | Problem, typed: Sequence[str] = ()) -> None:
    """Print an error with its code, and its remedy, in the words of the terminal: those that were `typed`."""
    param = (fault.param if isinstance(fault, NibbleError) else None) or ""
    option, message = option_of(param, typed), fault.message
    if param and message.startswith(f"{param}: "):
        message = option + message.removeprefix(param)
    elif param not in message and option not in message:
        message = f"{message} ({option})"
    message = with_options(message)
    console.print(f"[bold red]error[/] {escape(message)} [dim]\\[{escape(fault.code)}][/]")
    if fault.remedy:
        console.print(f"[bold]remedy[/] {escape(in_terminal_words(fault.code, fault.remedy))}")


def read_settings() -> Settings:
    from pydantic import ValidationError

    from app.core.settings import Settings

    try:
        return Settings()
    except ValidationError as fault:
        first = fault.errors()[0]
        name = "NIBBLE_" + "_".join(str(step) for step in first["loc"]).upper()
        value = "" if Settings.is_secret(str(first["loc"][0])) else f"={first['input']!r}"
        raise InvalidRequest(
            f"{name}{value}: {field_fault(first)}",
            code="setting_invalid",
            remedy="correct the environment variable; .env.example describes each of them",
        ) from fault


def connect(url: str | None, api_key: str | None) -> NibbleClient:
    """A client of the service at `url`, by default of the one on this machine."""
    from app.client import NibbleClient, Retries
    from app.client.paths import is_loopback

    settings = read_settings()
    url = url or local_url(settings)
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"{url} is not the address of a service",
            code="url_invalid",
            remedy="write it as http://127.0.0.1:8420, in --url or NIBBLE_URL",
        )
    # The stored key belongs to the service on this machine and is never sent to another host.
    if api_key is None and is_loopback(url):
        api_key = local_api_key(settings)
    return NibbleClient(url, api_key=api_key, retries=Retries(refused_connections=False, on_pause=show_pause))


def show_pause(fault: NibbleError, seconds: float) -> None:
    """Show the reason of a retry, on a terminal only."""
    console = stderr()
    if console.is_terminal:
        console.print(f"[dim]{escape(fault.message)}; trying again in {seconds:.1f} s[/]")


def local_url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104  # compared, not bound
    return f"http://{host}:{settings.port}"


def api_key_file(settings: Settings) -> Path:
    from app.core.access.api_keys import KEY_FILE

    return settings.state_dir / KEY_FILE


def local_api_key(settings: Settings) -> str | None:
    """The key of the service on this machine: the operator's, else the one in the state folder."""
    if settings.bootstrap_api_key is not None:
        return settings.bootstrap_api_key.get_secret_value()
    try:
        return api_key_file(settings).read_text().strip() or None
    except OSError:
        return None


def human_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
