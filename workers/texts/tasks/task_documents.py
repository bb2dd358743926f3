"""The documents of a bundled task, for lm-eval: each task's file names this function."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset


def read(file: str, **_metadata: object) -> dict[str, Dataset]:
    """The documents of the JSON lines beside this module, as the split `test`."""
    lines = (Path(__file__).parent / file).read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
