"""/v1/completions: responses and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from workers.serving.answers import DONE, Reply, finite, prompt_scores, shown
from workers.serving.protocol import CompletionRequest
from workers.serving.requests import Alternative, Choice, TextDelta

OBJECT = "text_completion"


class TextChoice:
    """One choice, put together from its deltas; `length` is where its next text starts."""

    def __init__(self, reply: Reply, request: CompletionRequest, index: int) -> None:
        self.reply, self.request, self.index = reply, request, index
        self.prompt = reply.answer.prompts[index // (request.n or 1)]
        self.length = 0
        self.begun = False

    def chunk_choice(self, delta: TextDelta) -> dict[str, Any]:
        """A delta as a choice of a chunk; the first one begins with the prompt if `echo` asks for it."""
        request = self.request
        text = delta.text if self.begun or not request.echo else self.echo() + delta.text
        choice: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": None if request.logprobs is None else self.logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if request.prompt_logprobs is not None and not self.begun:
            scores = prompt_scores(self.reply.served, self.prompt, delta, request.prompt_logprobs)
            choice["prompt_logprobs"] = scores
        if request.return_token_ids:
            choice["token_ids"] = [each.token for each in delta.choices]
            choice["prompt_token_ids"] = None if self.begun else list(self.prompt)
        self.begun = True
        self.length += len(text)
        return choice

    def echo(self) -> str:
        return self.reply.served.tokenization.decode(self.prompt)

    def logprobs(self, delta: TextDelta) -> dict[str, Any]:
        """As OpenAI and vLLM: of the tokens of the text, those of the prompt before them if it is echoed.

        With `echo` the token that ends the text is among them: lm-eval leaves the last one out.
        """
        logprobs: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self.length
        echoed: list[Choice | None] = []
        if self.request.echo and not self.begun:
            echoed = [None, *(delta.prompt_scores or ())]
        choices = delta.choices if self.request.echo else shown(self.reply.served, delta)
        for choice in [*echoed, *choices]:
            text = self.token_text(self.prompt[0] if choice is None else choice.token)
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(None if choice is None else finite(choice.logprob))
            logprobs["top_logprobs"].append(None if choice is None else self.best(choice))
            logprobs["text_offset"].append(offset)
            offset += len(text)
        return logprobs

    def best(self, choice: Choice) -> dict[str, float]:
        """The token itself is among them, also beyond the number that was asked for."""
        own = Alternative(choice.token, choice.logprob)
        top = choice.top[: self.request.logprobs]
        return {self.token_text(each.token): finite(each.logprob) for each in (*top, own)}

    def token_text(self, token: int) -> str:
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self.reply.served.tokenization.token_text(token)


async def respond(reply: Reply, request: CompletionRequest) -> dict[str, Any]:
    """The whole response. Raises the engine's error."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for delta in reply.deltas():
        parts[delta.index].append(choices[delta.index].chunk_choice(delta))
    return reply.envelope([joined(each) for each in parts]) | {"usage": reply.usage()}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of a choice as one; what only the first one says stays."""
    whole = {**parts[-1], **parts[0]} | {key: parts[-1][key] for key in ("finish_reason", "stop_reason")}
    whole["text"] = "".join(choice["text"] for choice in parts)
    if "token_ids" in whole:
        whole["token_ids"] = [token for choice in parts for token in choice["token_ids"]]
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            key: [value for choice in parts for value in choice["logprobs"][key]] for key in whole["logprobs"]
        }
    return whole


async def stream(reply: Reply, request: CompletionRequest) -> AsyncIterator[bytes]:
    """The frames of a stream."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    async for delta in reply.deltas():
        yield reply.frame([choices[delta.index].chunk_choice(delta)], OBJECT)
    if request.include_usage:
        yield reply.frame([], OBJECT)
    yield DONE
