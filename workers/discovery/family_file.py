"""The family of a job's model, found once: ranks and a resumed job on this host read the same file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.core.errors import ModelRefused
from app.core.planning.family import Family, known_family
from workers.discovery.family_discovery import discover

FAMILY = "family.json"


def traced_family(work: Path, config: Mapping[str, Any]) -> Family:
    """The family of this config.json, from the job's work folder or by tracing.

    Tracing draws the same random weights for the same config.json, so a job that goes on elsewhere finds the
    same. Raises ModelRefused if the model can't be quantized.
    """
    path = work / FAMILY
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(traced(config).model_dump_json(exclude_defaults=True), "utf-8")
        fresh.replace(path)
    return Family.model_validate_json(path.read_bytes())


def traced(config: Mapping[str, Any]) -> Family:
    """The family by tracing. Raises ModelRefused; of a known type for what its config.json says."""
    try:
        return discover(config)
    except ModelRefused as refusal:
        if refusal.__cause__ is None or known_family(str(config.get("model_type"))) is None:
            raise
        raise ModelRefused(
            f"config.json gives no model: {refusal.message}",
            code="config_invalid", remedy="restore the model's original config.json",
        ) from refusal  # fmt: skip
