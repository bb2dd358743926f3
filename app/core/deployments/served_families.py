"""Which model types the service's own server answers for; a file lists those that it does not.

The file is written by tests/families/serving.py, which holds the server's answers against transformers'.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from app.core.errors import ModelRefused
from app.core.records.specs import Engine

UNSERVED = Path(__file__).parent / "unserved.json"


@cache
def unserved() -> dict[str, str]:
    reasons: dict[str, str] = json.loads(UNSERVED.read_text("utf-8"))
    return reasons


def unserved_note(model_type: str, engine: Engine) -> str | None:
    """A note on a deployment that the service's own server could not answer for, if another might.

    Raises ModelRefused if it is the one that was asked for.
    """
    reason = unserved().get(model_type)
    if engine == "vllm" or reason is None:
        return None
    message = f"models of type {model_type} are quantized, but not served by Nibble's own server: {reason}"
    if engine == "auto":
        return f"{message}; `deploy` needs a worker with vLLM"
    raise ModelRefused(
        message, code="model_not_served", param="deploy.engine",
        remedy="deploy with engine vllm, if that has the model; or leave `deploy` out",
    )  # fmt: skip
