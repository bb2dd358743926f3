"""Writes docs/models.md from the results of the table: `python -m tests.families.page`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.core.formats.compressed_tensors import EXPERTS_LOST, UNOPENED_TYPES
from tests.families.table import RESULTS, ROUNDED, SELF_CHECK, is_right

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
REFUSED = Path(__file__).parent.parent / "golden" / "refused_types.json"
INTRODUCTION = """# Models

Which linears of a model read one input, and what before them can absorb their scales, is found by tracing a
tiny model of its class. It is accepted only if the scaled layer computes what the original does.
`nibble discover MODEL|TYPE` shows it. What was found for the types below comes with Nibble; a type that is
missing here, or a setting of config.json under which nothing was traced, is traced when the job starts.

Of a model for images or sound the language model is quantized. Towers, projectors and drafts of further
tokens keep every byte, and loaders are told so.

"""
MEASURED = """Each type was quantized once as a tiny random model (AWQ, 4 bits, groups of 32,
compressed-tensors) with transformers 5.24: `make families`. "Scaled" counts linears that have a smooth layer,
of all that are quantized; those without one are clipped and rounded all the same. "Opened" is what
transformers makes of the files: `yes` if it finds all weights and the KL from the original is the report's
within 5 %. "Served" is whether Nibble's own server answers as transformers does.

Where "opened" is not `yes`, the files are as vLLM reads them, and the limit is transformers':

- `without experts`: its class keeps a layer's experts in one tensor, and it has no way there from quantized
  experts, which files hold one by one. It gives the model random experts without an error. Where the recipe's
  `ignore` has `re:.*\\.experts\\..*`, they are written in one tensor as in the original; what transformers
  makes of that stands behind it. The plan of such a job says so.
- `no` with "automatic conversion": it joins convolutions while it loads, and drops there what is not packed.
- `no` with "no attribute 'weight'": its class reads the weight of a linear itself, which packed ones lack.

"""


def page(results: dict[str, Any], refused: dict[str, str]) -> str:
    good = {name: row for name, row in results.items() if "self_check" in row}
    count = sum(opened(row) == "yes" for row in good.values())
    worst = max(row["self_check"] for name, row in good.items() if name not in ROUNDED)
    rounded = max(good[name]["self_check"] for name in ROUNDED)
    lines = [
        INTRODUCTION, f"## {len(good)} types that are quantized\n\n", MEASURED,
        f"Of the {len(good)} types transformers opens {count}. The largest self-check (what the scaled layer "
        f"changes; at most {SELF_CHECK:.0e} is asked) is {worst:.1e}, and {rounded:.1e} of "
        f"{', '.join(f'`{name}`' for name in ROUNDED)}, one of whose layers is 1.2e-06 off itself in "
        "float64.\n\n",
        "| type | class | scaled | opened | served |\n|---|---|---|---|---|\n",
        *(family_line(name, row) for name, row in good.items()),
        "\n## Types that are refused\n\n| type | why |\n|---|---|\n",
        *refused_lines({**{n: why_of(row) for n, row in results.items() if n not in good}, **refused}),
    ]  # fmt: skip
    return "".join(lines)


def family_line(name: str, row: dict[str, Any]) -> str:
    served = row.get("served", "not tried")
    state = "yes" if served is True else f"no: {cell(served)}"
    return f"| `{name}` | {row['class']} | {row['scaled']} of {row['linears']} | {opened(row)} | {state} |\n"


def opened(row: dict[str, Any]) -> str:
    if is_right(row):
        return "yes"
    if "transformers" in row:
        return f"no: {cell(row['transformers'])}"
    figures = f"KL {row['opens']:.3f}, {row['kl']:.3f} by the report"
    if not lost_experts(row):
        return f"otherwise: {figures}"
    kept = opened(row["kept"]) if "kept" in row else "no other linears"
    return f"without experts: {figures}; where they keep their precision: {kept}"


def lost_experts(row: dict[str, Any]) -> bool:
    """Whether the experts are what transformers does not find."""
    lost = row.get("lost", ())
    return bool(lost) and all(".experts." in name for name in lost)


def why_of(row: dict[str, Any]) -> str:
    return str(row.get("refused") or row.get("fault"))


def refused_lines(reasons: dict[str, str]) -> Iterator[str]:
    for name, reason in sorted(reasons.items()):
        yield f"| `{name}` | {cell(reason)} |\n"


def cell(text: Any) -> str:
    """A text that breaks no table and starts no markup."""
    plain = " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return plain.replace("_", "\\_").replace("*", "\\*")


def written() -> str:
    return page(json.loads(RESULTS.read_text("utf-8")), json.loads(REFUSED.read_text("utf-8")))


def unopened(results: dict[str, Any]) -> dict[str, str]:
    """The types whose files transformers does not open right: that it loses experts, or its words."""
    wrong = {name: row for name, row in results.items() if "self_check" in row and not is_right(row)}
    return {
        name: EXPERTS_LOST if lost_experts(row) else row.get("transformers", "it finds other weights")
        for name, row in wrong.items()
    }


if __name__ == "__main__":
    PAGE.write_text(written(), "utf-8")
    types = unopened(json.loads(RESULTS.read_text("utf-8")))
    UNOPENED_TYPES.write_text(json.dumps(types, indent=1) + "\n", "utf-8")
