"""llm-compressor on given token windows, timed inside its process; prints one JSON line.

Runs in an environment of its own (`pip install llmcompressor==0.14.0.1`), started by `quantize.py` and
`fidelity.py`. With `--evaluation` the line holds perplexity, KL and top-1 agreement on those windows too.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

# Its cache pins memory without asking whether there is a device to pin it for.
torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self


def modifiers(options: argparse.Namespace) -> list[Any]:
    """A preset by plain rounding; or rtn, awq, gptq or awq+gptq, asymmetric, GPTQ with its default, static
    activation order."""
    if options.preset:
        return [QuantizationModifier(targets="Linear", scheme=options.preset, ignore=["lm_head"])]
    method, bits, group_size = options.method, options.bits, options.group_size
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, strategy="group", group_size=group_size, symmetric=False),
    )
    rounding = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    scales = [AWQModifier(duo_scaling="both", n_grid=20)] if method.startswith("awq") else []
    return [*scales, rounding(config_groups={"group_0": scheme}, ignore=["lm_head"])]


@torch.no_grad()
def judged(model: Any, original: Any, windows: list[list[int]]) -> dict[str, float]:
    """Perplexity, KL from the original in nats per token, and how often both agree on the likeliest one."""
    losses, divergences, agreed = [], [], []
    for window in windows:
        tokens = torch.tensor([window])
        answer = model(input_ids=tokens, labels=tokens)
        losses.append(answer.loss.double())
        ours, theirs = (logits[0, :-1].log_softmax(-1) for logits in (answer.logits, original(tokens).logits))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1).double().mean())
        agreed.append((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    return {
        "perplexity": math.exp(float(torch.stack(losses).mean())),
        "kl": float(torch.stack(divergences).mean()),
        "top1": float(torch.stack(agreed).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", required=True, help="JSON list of token id lists")
    parser.add_argument("--evaluation", help="as --windows: the perplexity on these is printed too")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--method", default="awq", choices=("rtn", "awq", "gptq", "awq+gptq"))
    parser.add_argument("--preset", help="a scheme of compressed-tensors, such as FP8_DYNAMIC")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.windows, encoding="utf-8") as file:
        windows = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    samples = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    started, busy = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=samples,
        recipe=modifiers(options),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    line = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        "dtype": str(model.dtype),
        "torch": torch.__version__,
    }
    if options.evaluation:
        with open(options.evaluation, encoding="utf-8") as file:
            original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            line |= judged(model, original, json.load(file))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
