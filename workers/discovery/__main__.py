"""Writes the files of known families: `python -m workers.discovery TYPE...`, or `--all`."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from app.core.errors import ModelRefused
from app.core.planning.family import FAMILIES, Family
from workers.discovery.family_discovery import discover_type
from workers.discovery.random_weights import MAPS

log = logging.getLogger("workers.discovery")


def all_types() -> list[str]:
    """Every type that transformers has a class for which may give text."""
    return sorted({name for table in MAPS for name in table})


def written(family: Family) -> str:
    return family.model_dump_json(exclude_defaults=True, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.discovery", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types of transformers")
    parser.add_argument("--all", action="store_true", help="every type of the installed transformers")
    parser.add_argument("--to", type=Path, default=FAMILIES, help="folder of the files")
    parser.add_argument("--reasons", type=Path, help="JSON file of what was refused, type by type")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reasons: dict[str, str] = {}
    if arguments.reasons and arguments.reasons.exists():
        reasons = json.loads(arguments.reasons.read_text("utf-8"))
    for model_type in all_types() if arguments.all else arguments.types:
        begun = time.monotonic()
        try:
            family = discover_type(model_type)
        except ModelRefused as refusal:
            reasons[model_type] = refusal.message
            log.info("%s refused: %s", model_type, refusal.message)
        else:
            reasons.pop(model_type, None)
            (arguments.to / f"{model_type}.json").write_text(written(family), "utf-8")
            log.info("%s %d kinds, %.1f s", model_type, len(family.kinds), time.monotonic() - begun)
        if arguments.reasons:
            arguments.reasons.write_text(json.dumps(reasons, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
