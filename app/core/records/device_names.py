"""Names of the devices that a model may be served on; what they can do is in `planning/serving_devices`."""

from __future__ import annotations

from typing import Literal

DeviceName = Literal[
    "a10", "a100", "l4", "l40s", "rtx4090", "h100", "h200", "b200", "rtx5090", "mi300x", "cpu",
]  # fmt: skip
