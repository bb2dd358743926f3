"""llm-compressor's AWQ on given token windows, timed inside its process; prints one JSON line.

Runs in an environment of its own (`pip install llmcompressor==0.14.0.1`), started by `quantize.py`.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

# Its cache pins memory without asking whether there is a device to pin it for.
torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", required=True, help="JSON list of token id lists")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.windows, encoding="utf-8") as file:
        windows = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    samples = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    recipe = [
        AWQModifier(duo_scaling="both", n_grid=20),
        QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"]),
    ]
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=samples,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "dtype": str(model.dtype), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
