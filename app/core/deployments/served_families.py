"""Which formats and model types deployments answer for; a file lists the types that the own server does not.

The file is written by tests/families/serving.py, which holds the server's answers against transformers'.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from app.core.errors import ModelRefused
from app.core.formats.registry import FORMATS, FormatName
from app.core.records.serving_options import Engine

UNSERVED = Path(__file__).parent / "unserved.json"


@cache
def unserved() -> dict[str, str]:
    reasons: dict[str, str] = json.loads(UNSERVED.read_text("utf-8"))
    return reasons


def refuse_unserved_format(name: FormatName, *, param: str) -> None:
    """Raises ModelRefused for a format that no engine of deployments reads."""
    reason = FORMATS[name].unserved
    if reason is not None:
        raise ModelRefused(
            f"{name} artifacts are not deployed: {reason}", code="format_not_served", param=param,
            remedy=f"download the artifact and serve it there, or deploy one of {served_formats()}",
        )  # fmt: skip


def served_formats() -> str:
    return ", ".join(name for name in FORMATS if FORMATS[name].unserved is None)


def unserved_note(model_type: str, engine: Engine, *, param: str) -> str | None:
    """A note on a deployment that the service's own server could not answer for, if another might.

    Raises ModelRefused if it is the one that was asked for; `param` is the field that names the engine.
    """
    reason = unserved().get(model_type)
    if engine == "vllm" or reason is None:
        return None
    message = f"models of type {model_type} are quantized, but not served by Nibble's own server: {reason}"
    if engine == "auto":
        return f"{message}; `deploy` needs a worker with vLLM"
    raise ModelRefused(
        message, code="model_not_served", param=param,
        remedy="deploy with engine vllm, if that has the model; or don't deploy it",
    )  # fmt: skip
