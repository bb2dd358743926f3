"""Writes docs/settings.md, and the meanings that the service shows, from `.env.example`.

A test compares its names and defaults with the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from app.api.service_settings import MEANINGS
from app.core.settings import Settings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """# Settings

Made from `.env.example` by `docs/write_settings.py`. Each process reads these environment variables once,
when it starts; a value that can't be is refused then, by its name. `nibble doctor` says what they lead to on
a host.

| variable | default | |
|---|---|---|
"""
ASSIGNMENT = re.compile(r"# (NIBBLE_\w+)=(.*)")


def page() -> str:
    rows = [
        f"| `{name}` | {f'`{default}`' if default else 'empty'} | {escaped(meaning)} |"
        for name, default, meaning in settings()
    ]
    return INTRODUCTION + "\n".join(rows) + "\n"


def settings() -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning; names in one block share their meaning."""
    for block in (ROOT / ".env.example").read_text("utf-8").split("\n\n"):
        lines = block.splitlines()
        meaning = " ".join(line.removeprefix("# ") for line in lines if not ASSIGNMENT.fullmatch(line))
        for line in lines:
            if assigned := ASSIGNMENT.fullmatch(line):
                secret = Settings.is_secret(assigned[1].removeprefix("NIBBLE_").lower())
                yield assigned[1], assigned[2], meaning + (" Never shown in messages." if secret else "")


def meanings() -> str:
    """As JSON: name and meaning of each setting."""
    return json.dumps({name: meaning for name, _, meaning in settings()}, indent=1, ensure_ascii=False) + "\n"


def escaped(text: str) -> str:
    return re.sub(r"([|<>\[\]*])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    MEANINGS.write_text(meanings(), "utf-8")
