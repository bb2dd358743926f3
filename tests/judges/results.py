"""What vLLM said of each cell, recorded in results.json, and the table of it in the guide.

    make judges FORM=long RECORD=1

judges all cells and writes both anew.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from pydantic import BaseModel

from tests.judges.cells import Cell

RECORD = Path(__file__).with_name("results.json")
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "vllm.md"
MARKERS = "<!-- judged by vLLM: made by make judges -->\n", "<!-- end of what vLLM judged -->\n"
REASONS = (
    r"(Quant type \(\w+\) not supported by \w+)",
    r"(Unsupported quantization config: [^\[]*)",
    r"(No compressed-tensors compatible scheme was found)",
    r"^([^.]*)",
)


class Outcome(BaseModel, frozen=True, extra="forbid"):
    """vLLM's reason for refusing the files of a cell, or how far it is from what the report says of them."""

    refusal: str | None = None
    perplexity_off: float = 0.0  # relative to the report's figure
    kl_off: float = 0.0


class Record(BaseModel, frozen=True, extra="forbid"):
    version: str  # of vLLM
    outcomes: dict[str, Outcome]  # by the cell's name


def reason(error: str) -> str:
    """The words of vLLM's error that say why."""
    return next(match[1].strip() for match in (re.search(each, error) for each in REASONS) if match)


def recorded() -> Record:
    return Record.model_validate_json(RECORD.read_text())


def write_record(record: Record, cells: list[Cell]) -> None:
    """Write the record and the guide's table."""
    RECORD.write_text(json.dumps(record.model_dump(exclude_defaults=True), indent=1) + "\n")
    before, _, rest = GUIDE.read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    GUIDE.write_text(before + MARKERS[0] + table(record, cells) + MARKERS[1] + after)


def guide_table() -> str:
    return GUIDE.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]


def table(record: Record, cells: list[Cell]) -> str:
    """A row for each format and kind of numbers."""
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.format, cell.numbers), []).append(cell)
    lines = [f"| file | numbers | vLLM {record.version} on a CPU |", "|---|---|---|"]
    for (name, numbers), members in sorted(rows.items()):
        outcomes = [record.outcomes[str(cell)] for cell in members]
        lines.append(f"| `{name}` | {numbers} | {verdict(members, outcomes)} |")
    return "\n".join(lines) + "\n"


def verdict(cells: list[Cell], outcomes: list[Outcome]) -> str:
    refusals = {outcome.refusal for outcome in outcomes}
    if refusals != {None}:
        return "refused: " + "; ".join(f"`{refusal}`" for refusal in sorted(refusals, key=str))
    groups = ", ".join(str(size) for size in sorted({cell.group_size for cell in cells}))
    perplexity = upward(max(outcome.perplexity_off for outcome in outcomes))
    kl = upward(max(outcome.kl_off for outcome in outcomes))
    held = "runs" if cells[0].scheme != "wna16" else f"runs; groups of {groups}"
    return f"{held}; perplexity within {perplexity} of the report's, KL within {kl}"


def upward(share: float) -> str:
    """A share in hundredths of a percent that it does not exceed."""
    return f"{math.ceil(share * 10_000) / 10_000:.2%}"
