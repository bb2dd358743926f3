"""What `nibble discover` prints: the kinds of layers of a model, found by tracing, and their groups."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from app.core.errors import ModelRefused
from app.core.planning.family import Family, LayerKind, ScaleGroup
from app.core.sources.local_model import LocalModel
from app.core.sources.model_headers import inspect_model
from workers.discovery.family_discovery import discover, discover_type

MANY = 6  # linears of a group that are named one by one


def family_of(what: str) -> Family:
    """The family of a folder's model, or of a type under its default settings. Raises ModelRefused."""
    if Path(what).is_dir():
        config: dict[str, Any] = inspect_model(LocalModel(Path(what), (Path("/"),))).config
        return discover(config)
    if what not in CONFIG_MAPPING:
        raise ModelRefused(
            f"{what!r} is neither a folder nor a model type of transformers",
            code="architecture_unsupported", remedy="give a model's folder, or a type such as qwen3_5",
        )  # fmt: skip
    return discover_type(what)


def lines(family: Family) -> Iterator[str]:
    yield f"{family.model_type}: {family.class_name}, layers at {family.layers}"
    for number, kind in enumerate(family.kinds):
        yield f"\nkind {number} of layers{experts_of(kind)}"
        for group in kind.groups:
            yield f"  {linears_of(group)} <- {smooth_of(group)}"
            if group.compensated:
                yield f"      compensated: {', '.join(group.compensated)}"


def experts_of(kind: LayerKind) -> str:
    return "" if kind.experts is None else f", with experts at {kind.experts.module}"


def linears_of(group: ScaleGroup) -> str:
    names = group.balance_layers
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more


def smooth_of(group: ScaleGroup) -> str:
    if group.smooth_layer is None:
        return f"nothing ({group.unscaled})"
    rows = f"block {group.block[0]} of {group.block[1]}" if group.block else group.smooth_rows
    shared = ", shared by heads" if group.repeats_heads else ""
    return f"{group.smooth_layer} ({group.smooth_kind}, {rows}{shared})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="nibble discover", description=__doc__)
    parser.add_argument("what", help="a model's folder, or a model type of transformers")
    parser.add_argument("--json", action="store_true", help="the family as its file has it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    try:
        family = family_of(arguments.what)
    except ModelRefused as refusal:
        text = f"error {refusal.message} [{refusal.code}]\nremedy {refusal.remedy}"
        if arguments.json:
            text = json.dumps({"code": refusal.code, "message": refusal.message, "remedy": refusal.remedy})
        sys.stderr.write(text + "\n")
        return 1
    as_file = family.model_dump_json(exclude_defaults=True, indent=1)
    sys.stdout.write((as_file if arguments.json else "\n".join(lines(family))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
