"""What a client's features come to against one server.

    python CLIENT_probe.py SCENE OUTPUT

SCENE is a JSON file with the server's address and what its model answers. OUTPUT gets the client's version
and a row for each feature: ok, refused (the client raised its error for a refusal of the server) or failed.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCENE = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text("utf-8")))  # what its fixture says
QUESTION = "Tell me about a city."
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
TOO_LONG = "a word and " * 3000
WRONG_KEY = "wrong"
ABSENT = "absent"


def same(actual: object, expected: object) -> None:
    assert actual == expected, f"{actual!r}, not {expected!r}"


def report(
    package: str, refusals: tuple[type[BaseException], ...], features: dict[str, Callable[[], object]]
) -> None:
    """Use each feature; a function that is a coroutine's runs in an event loop of its own."""
    rows = [{"feature": name, **outcome(use, refusals)} for name, use in features.items()]
    document = {"version": version(package), "rows": rows}
    Path(sys.argv[2]).write_text(json.dumps(document, ensure_ascii=False), "utf-8")


def outcome(use: Callable[[], object], refusals: tuple[type[BaseException], ...]) -> dict[str, str]:
    try:
        result = use()
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except refusals as error:
        return {"outcome": "refused", "detail": f"{type(error).__name__}: {error}"[:1000]}
    except Exception:  # noqa: BLE001  # whatever a client raises is its row
        return {"outcome": "failed", "detail": traceback.format_exc()[-2000:]}
    return {"outcome": "ok", "detail": ""}
