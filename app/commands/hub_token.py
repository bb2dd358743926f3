"""Reads a hub token from a file, standard input or the environment.

Never from the command line: a shell keeps those, and others of the host see them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.core.errors import InvalidRequest

HubTokenOption = Annotated[
    str | None,
    typer.Option(
        "--hub-token",
        metavar="FILE",
        help="File with the hub token of this job or push, - for standard input, or env:NAME of a variable.",
        show_default=False,
        rich_help_panel="The job",
    ),
]


def read_hub_token(source: str | None) -> str | None:
    """The token at `source`. Raises InvalidRequest, which never names what may be a token."""
    if source is None:
        return None
    if source == "-":
        return checked(sys.stdin.read())
    if source.startswith("env:"):
        return checked(os.environ.get(source.removeprefix("env:"), ""))
    try:
        return checked(Path(source).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise refused("there is no such file, or it can't be read") from fault


def checked(text: str) -> str:
    token = text.strip()
    if not token:
        raise refused("it is empty")
    return token


def refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"--hub-token: {why}",
        code="hub_token_missing",
        remedy="name a file with the token, - for standard input, or env:HF_TOKEN; the token itself does not "
        "belong on a command line",
        param="hub_token",
    )
