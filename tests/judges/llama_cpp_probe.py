"""Reads a text token by token with llama.cpp; runs in an environment of its own.

    python -P llama_cpp_probe.py MODEL.gguf TOKENS.json

TOKENS.json is a list of token ids. Writes one line of JSON: `log_probabilities` of each token but the first,
given those before it, and `answer`, what it says in a chat.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp

LIKELIEST = 4096  # of 49,152: each takes a line of JSON
CHAT = [{"role": "user", "content": "What is gravity?"}]


def opened(model: str) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel = 256, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    return xllamacpp.Server(settings)


def log_probability(server: Any, before: list[int], token: int) -> float:
    """llama.cpp's log-probability of a token, which must be among its likeliest."""
    request = {
        "prompt": before,
        "n_predict": 1,
        "n_probs": LIKELIEST,
        "cache_prompt": True,
        "temperature": 1.0,
    }
    (said,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    return next(float(each["logprob"]) for each in said["top_logprobs"] if each["id"] == token)


def main() -> None:
    server, tokens = opened(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    scored = [log_probability(server, tokens[:index], tokens[index]) for index in range(1, len(tokens))]
    chat = server.handle_chat_completions({"messages": CHAT, "max_tokens": 24, "temperature": 0})
    answer = chat["choices"][0]["message"]["content"]
    sys.stdout.write(json.dumps({"log_probabilities": scored, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
