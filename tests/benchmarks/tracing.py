"""What it costs to find a type's groups: processor seconds of discovery, a kind of layer.

    python -m tests.benchmarks.tracing [TYPE ...]

Each type is traced under its default settings, and with the variants that its file has. The first is traced
once before, since it loads what all of them share.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

from transformers.utils import logging as transformers_logging

from app.core.planning.family import Family
from workers.discovery.family_discovery import discover, discover_type

TYPES = ("llama", "qwen3_moe", "qwen3_5", "gemma3n", "gemma4", "kimi_linear", "deepseek_v32")


def cost(found: Callable[[], Family]) -> str:
    """Seconds a kind of layer, and for how many kinds."""
    begun = time.process_time()
    family = found()
    seconds = time.process_time() - begun
    return f"{seconds / len(family.kinds):.2f} a kind, {len(family.kinds)} kinds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    discover({"model_type": arguments.types[0]})
    print("| type | processor seconds, default settings | with variants |\n|---|---|---|")
    for model_type in arguments.types:
        default = cost(lambda name=model_type: discover({"model_type": name}))
        print(
            f"| {model_type} | {default} | {cost(lambda name=model_type: discover_type(name))} |", flush=True
        )


if __name__ == "__main__":
    main()
