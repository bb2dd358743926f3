"""llm: its command line, with the models of extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import ABSENT, CITY, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

FOLDER = Path(tempfile.mkdtemp())
KEY = "api_key_name: k"  # without it --key is not sent
MODELS = f"""
- {{model_id: chat, model_name: {SCENE.model}, api_base: "{SCENE.base}", {KEY},
   supports_schema: true, supports_tools: true}}
- {{model_id: text, model_name: {SCENE.model}, api_base: "{SCENE.base}", {KEY}, completion: true}}
- {{model_id: absent, model_name: {ABSENT}, api_base: "{SCENE.base}", {KEY}}}
"""
FUNCTIONS = 'def visit(city: str) -> str:\n    "Visits a city."\n    return "Sunny in " + city\n'


class RefusedError(Exception):
    """The program ended with an exit code that is not 0."""


def ask(*arguments: str, model: str = "chat", key: str = SCENE.key, options: tuple[str, ...] = ()) -> str:
    """What the command prints. Raises RefusedError with its words on stderr."""
    command = [sys.executable, "-m", "llm", "prompt", "-m", model, "--key", key, "-o", "temperature", "0"]
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER)}
    done = subprocess.run(
        [*command, *options, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RefusedError(done.stderr.strip()[-600:])
    return done.stdout.strip()


def chat() -> None:
    same(ask(QUESTION, "--no-stream"), SCENE.said)


def stream() -> None:
    same(ask(QUESTION), SCENE.said)


def completions() -> None:
    same(ask("Say:", model="text", options=("-o", "max_tokens", "30")), SCENE.said)


def tools_auto() -> None:
    """The command calls the function, and answers from its result."""
    printed = ask(QUESTION, "--functions", FUNCTIONS, "--td")
    assert SCENE.after in printed, printed


def structured() -> None:
    assert json.loads(ask(QUESTION, "--schema", json.dumps(CITY)))["city"] in ("Rome", "Oslo")


def unknown_model() -> None:
    ask(QUESTION, model="absent")


def wrong_key() -> None:
    ask(QUESTION, key=WRONG_KEY)


def too_long() -> None:
    ask(TOO_LONG)


(FOLDER / "extra-openai-models.yaml").write_text(MODELS)
report("llm", (RefusedError,), {
    "chat": chat, "stream": stream, "completions": completions, "tools: auto": tools_auto,
    "tool results": tools_auto, "structured": structured, "unknown model": unknown_model,
    "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
