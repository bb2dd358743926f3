"""Opens a GGUF file with llama.cpp, makes tokens of texts and reads some; runs in an environment of its own.

    python -P llama_cpp_files_probe.py MODEL.gguf QUESTIONS.json

QUESTIONS.json has `texts`, and `tokens`, a list of token ids. Writes one line of JSON: `ids` of each text,
`log_probabilities` of each token but the first given those before it, and `answer`, what it says in a chat.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

LIKELIEST = 49_152  # every token of the vocabularies here
CHAT = [{"role": "user", "content": "What is gravity?"}]


def opened(model: str) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel = 256, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    return xllamacpp.Server(settings)


def token_ids(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server.listening_address}/tokenize", body, headers)  # its own address
    with urlopen(request) as answer:
        ids: list[int] = json.load(answer)["tokens"]
    return ids


def log_probability(server: Any, before: list[int], token: int, plain: int) -> float:
    """llama.cpp's log-probability of a token. `plain` is what it says: half a character has none."""
    request = {
        "prompt": before,
        "n_predict": 1,
        "n_probs": LIKELIEST,
        "cache_prompt": True,
        "temperature": 1.0,
        "logit_bias": [[plain, 1000.0]],
    }
    (said,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    return next(float(each["logprob"]) for each in said["top_logprobs"] if each["id"] == token)


def main() -> None:
    server, questions = opened(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    tokens, plain = questions["tokens"], token_ids(server, "a")[-1]
    chat = server.handle_chat_completions({"messages": CHAT, "max_tokens": 24, "temperature": 0})
    said = {
        "ids": [token_ids(server, text) for text in questions["texts"]],
        "log_probabilities": [
            log_probability(server, tokens[:index], tokens[index], plain) for index in range(1, len(tokens))
        ],
        "answer": chat["choices"][0]["message"]["content"],
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
