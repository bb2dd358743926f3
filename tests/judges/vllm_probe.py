"""Opens folders with vLLM's own loader; runs in an environment of its own.

    python -P vllm_probe.py WORK.json RESULTS.jsonl

The work is `folders` (the original model first), `windows` (lists of token ids, all of one length) and `chat`
(the messages of a conversation). The results are a line for each folder: `error` if vLLM refused it, else
the `perplexity` of the windows, `kl` from the original to it (nats a token), and the `prompt` and the greedy
`answer` of the chat in tokens.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: several, one after another
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

ANSWER_TOKENS = 12


def log_probabilities(model: LLM, windows: list[list[int]]) -> torch.Tensor:
    """(windows, positions but the first, vocabulary), float64."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": window} for window in windows]
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    return torch.stack(
        [
            torch.stack(
                [
                    by_token(scored.token_ids[start:end], scored.logprobs[start:end], vocabulary)
                    for start, end in list(zip(scored.start_indices, scored.end_indices, strict=True))[1:]
                ]
            )
            for scored in (
                output.prompt_logprobs for output in model.generate(prompts, sampling, use_tqdm=False)
            )
        ]
    )


def by_token(tokens: list[int], values: list[float], vocabulary: int) -> torch.Tensor:
    """The values in the order of the vocabulary; vLLM lists the prompt's token first, the others by value."""
    row = torch.full((vocabulary,), float("nan"), dtype=torch.float64)
    row[torch.tensor(tokens)] = torch.tensor(values).double()
    return row


class Judge:
    """Holds the original's log-probabilities against those of each further folder."""

    def __init__(self, windows: list[list[int]], chat: list[dict[str, str]]) -> None:
        self._windows = windows
        self._chat: Any = chat
        self._original: torch.Tensor | None = None

    def judge(self, folder: str) -> dict[str, object]:
        # The kernel for integers knows half precision alone; of the two, float16 is the finer one.
        dtype = "float32" if self._original is None else "float16"
        model = LLM(
            folder, dtype=dtype, enforce_eager=True, max_num_seqs=4, max_model_len=256, max_logprobs=-1
        )
        own = log_probabilities(model, self._windows)
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        (answer,) = model.chat(self._chat, sampling, use_tqdm=False)
        if self._original is None:
            self._original = own
        targets = torch.tensor(self._windows)[:, 1:, None]
        divergence = (self._original.exp() * (self._original - own)).sum(-1)
        return {
            "perplexity": float(own.gather(2, targets).mean().neg().exp()),
            "kl": float(divergence.mean()),
            "prompt": answer.prompt_token_ids,
            "answer": answer.outputs[0].token_ids,
        }


def main() -> None:
    work, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    judge = Judge(work["windows"], work["chat"])
    for folder in work["folders"]:
        try:
            outcome = judge.judge(folder)
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is its refusal; the test reads the words
            outcome = {"error": str(error)}
        gc.collect()
        cleanup_dist_env_and_memory()
        with results.open("a") as stream:
            stream.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
