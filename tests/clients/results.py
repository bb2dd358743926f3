"""Which clients there are, and what each got of the service: results.json, and the table of it in the guide.

    make clients RECORD=1

runs all clients and writes both anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

HERE = Path(__file__).parent
RECORD = HERE / "results.json"
VERSIONS = HERE / "versions"
GUIDE = HERE.parents[1] / "docs" / "guides" / "inference.md"
MARKERS = "<!-- what clients got: made by make clients -->\n", "<!-- end of what clients got -->\n"
# What the service refuses, and words of the refusal that have to reach the client's error.
REFUSALS = {
    "embeddings": ("generates text",),
    "unknown model": ("does not exist",),
    "wrong key": ("key",),
    "too long": ("tokens",),
}


@dataclass(frozen=True)
class Client:
    """A client, the pins in versions/ that it is installed by, and the probe that uses it."""

    pins: str
    title: str
    probe: str

    @property
    def is_node(self) -> bool:
        return self.probe.endswith(".mjs")


CLIENTS = (
    Client("openai-2", "`openai`", "openai_probe.py"),
    Client("openai-3", "`openai`", "openai_probe.py"),
    Client("openai-node-6", "`openai` (npm)", "openai_node_probe.mjs"),
    Client("openai-node-7", "`openai` (npm)", "openai_node_probe.mjs"),
    Client("anthropic", "`anthropic`", "anthropic_probe.py"),
    Client("ai-sdk-6", "`ai` (npm)", "ai_sdk_probe.mjs"),
    Client("ai-sdk-7", "`ai` (npm)", "ai_sdk_probe.mjs"),
    Client("langchain", "`langchain-openai`", "langchain_probe.py"),
    Client("litellm", "`litellm`", "litellm_probe.py"),
    Client("instructor", "`instructor`", "instructor_probe.py"),
    Client("pydantic-ai", "`pydantic-ai-slim`", "pydantic_ai_probe.py"),
    Client("llama-index", "`llama-index-llms-openai-like`", "llama_index_probe.py"),
    Client("llm", "`llm`", "llm_probe.py"),
    Client("lm-eval", "`lm-eval`", "lm_eval_probe.py"),
    Client("guidellm", "`guidellm`", "guidellm_probe.py"),
)


class Row(BaseModel, frozen=True, extra="forbid"):
    """What a feature came to."""

    feature: str
    outcome: Literal["ok", "refused", "failed"]
    detail: str = ""  # of what is not ok: the client's error


class Document(BaseModel, frozen=True, extra="forbid"):
    """What a probe writes."""

    version: str
    rows: tuple[Row, ...]


class Result(BaseModel, frozen=True, extra="forbid"):
    version: str
    features: dict[str, str]  # ok, or the name of the error by which the client says what was refused

    @classmethod
    def of(cls, document: Document) -> Result:
        rows = document.rows
        return cls(version=document.version, features={row.feature: verdict(row) for row in rows})


def verdict(row: Row) -> str:
    return row.detail.partition(":")[0] if row.outcome == "refused" else row.outcome


def faults(document: Document) -> list[Row]:
    """The rows that are not what they have to be: all works but what the service refuses in its own words."""
    return [row for row in document.rows if not is_right(row)]


def is_right(row: Row) -> bool:
    words = REFUSALS.get(row.feature)
    if words is None:
        return row.outcome == "ok"
    return row.outcome == "refused" and all(word in row.detail for word in words)


def recorded() -> dict[str, Result]:
    return {name: Result.model_validate(each) for name, each in json.loads(RECORD.read_text()).items()}


def write_result(client: Client, result: Result) -> None:
    """Put it into the record, and write the guide's table."""
    results = recorded() | {client.pins: result}
    ordered = {each.pins: results[each.pins] for each in CLIENTS if each.pins in results}
    document = {name: each.model_dump() for name, each in ordered.items()}
    RECORD.write_text(json.dumps(document, indent=1) + "\n")
    before, _, rest = GUIDE.read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    GUIDE.write_text(before + MARKERS[0] + table(ordered) + MARKERS[1] + after)


def guide_table() -> str:
    return GUIDE.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]


def table(results: dict[str, Result]) -> str:
    """A row for each feature, a column for each client."""
    clients = [each for each in CLIENTS if each.pins in results]
    features = list(dict.fromkeys(name for each in results.values() for name in each.features))
    heads = [f"{each.title} {results[each.pins].version}" for each in clients]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(clients) + 1) + "|"]
    for feature in features:
        cells = [mark(results[each.pins].features.get(feature)) for each in clients]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mark(verdict: str | None) -> str:
    return {None: "–", "ok": "✓"}.get(verdict, f"`{verdict}`")
