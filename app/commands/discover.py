"""`nibble discover`: which linears of a model share an input, and what can absorb their scales."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from app.commands.quantize import refuse_missing_engine
from app.commands.terminal import AsJson


def discover(
    what: Annotated[str, typer.Argument(metavar="MODEL|TYPE", help="A model's folder, or a model type.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Find what the linears of a model share, by tracing a tiny model of its class.

    No weight is read. A job does the same for a model of a type that Nibble does not know.
    """
    refuse_missing_engine()
    # The process becomes the engine's: app imports nothing of workers.
    options = ["--json"] if as_json else []
    os.execv(sys.executable, [sys.executable, "-m", "workers.discovery.printed_family", what, *options])  # noqa: S606
