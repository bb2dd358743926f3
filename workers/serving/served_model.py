"""The model as the routes use it: prompts become generations, with the model's own defaults."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from app.core.errors import InvalidRequest, NotFound
from workers.serving.answer_readers import AnswerReader, PlainReader
from workers.serving.constraints import Constraint, text_constraint
from workers.serving.engine import Engine, News
from workers.serving.generation_settings import sampling_defaults
from workers.serving.grammar import Grammars, Matcher
from workers.serving.protocol import Body, CompletionRequest
from workers.serving.requests import Generation, Sampling, StopRules, TextDelta
from workers.serving.server_metrics import ServerMetrics
from workers.serving.tokenization import Tokenization

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Prompts:
    """The token ids of a request, and how its text is constrained."""

    ids: list[tuple[int, ...]]
    max_tokens: int | None
    top_logprobs: int | None
    matcher: Matcher | None = None
    reader: Callable[[], AnswerReader] = PlainReader  # of each choice's text
    reads_marks: bool = False  # special tokens are marks in it


class Answer:
    """The deltas of all choices of a request, in the order of the engine. Lives in the event loop."""

    def __init__(self, engine: Engine, prompts: Prompts, n: int) -> None:
        self.engine, self.prompts, self.choices = engine, prompts.ids, n * len(prompts.ids)
        self.reader = prompts.reader
        self.id = uuid.uuid4().hex
        self.ids: list[str] = []
        self.open = self.choices
        self._deltas: asyncio.Queue[TextDelta] = asyncio.Queue()

    def put(self, delta: TextDelta) -> None:
        self._deltas.put_nowait(delta)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Until every choice has ended."""
        while self.open:
            delta = await self._deltas.get()
            self.open -= delta.finish_reason is not None
            yield delta

    def cancel(self) -> None:
        """Stop the running generations: the caller has disconnected."""
        for id in self.ids if self.open else ():
            self.engine.cancel(id)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class ServedModel:
    """An engine with its tokenizer, under a name."""

    def __init__(self, name: str, engine: Engine, tokenization: Tokenization, metrics: ServerMetrics) -> None:
        self.name, self.engine, self.tokenization, self.metrics = name, engine, tokenization, metrics
        self.max_model_len = engine.limits.max_model_len
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self.defaults = sampling_defaults(tokenization.settings)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver the engine's deltas in `loop` from now on."""

        def publish(news: list[News]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(dispatch, news)

        self.engine.publish = publish

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise NotFound(f"the model {name!r} does not exist here", code="model_not_found",
                           remedy=f"this server has {self.name!r}", param="model")  # fmt: skip

    def completion_prompts(self, request: CompletionRequest) -> Prompts:
        """Encodes; as above."""
        most = self.engine.limits.max_waiting
        if len(request.prompts) > most:
            raise InvalidRequest(
                f"{len(request.prompts)} prompts are more than the {most} that may wait here",
                param="prompt", remedy="send them in several requests",
            )  # fmt: skip
        prompts: list[tuple[int, ...]] = []
        limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        for prompt in request.prompts:
            if isinstance(prompt, str):
                prompt = self.tokenization.encode(prompt, special_tokens=request.add_special_tokens)
            ids = self.truncated(tuple(prompt), request, request.max_tokens)
            prompts.append(self.checked(ids, request.max_tokens, "prompt"))
        if not prompts:
            raise InvalidRequest("prompt holds no prompt", param="prompt", remedy="give text or tokens")
        return Prompts(prompts, limit, request.logprobs, self.matcher(text_constraint(request)))

    def truncated(self, ids: tuple[int, ...], request: Body, max_tokens: int | None) -> tuple[int, ...]:
        """The end of a prompt, or its start, as `truncate_prompt_tokens` asks; -1: what there is room for."""
        most = request.truncate_prompt_tokens
        if most is None:
            return ids
        room = self.max_model_len - (1 if max_tokens is None else max_tokens)
        most = room if most == -1 else most
        return ids[:most] if request.truncation_side == "right" else ids[max(len(ids) - most, 0) :]

    def checked(self, ids: tuple[int, ...], max_tokens: int | None, param: str) -> tuple[int, ...]:
        """Raises InvalidRequest for a prompt that does not fit."""
        if not ids:
            raise InvalidRequest("the prompt has no tokens", param=param, remedy="give text or tokens")
        if not all(0 <= token < self.tokenization.vocabulary for token in ids):
            raise InvalidRequest(
                f"the prompt holds a token outside of 0..{self.tokenization.vocabulary - 1}",
                param="prompt", remedy="use this model's tokenizer",
            )  # fmt: skip
        if len(ids) + (1 if max_tokens is None else max_tokens) > self.max_model_len:
            asked = f" and {max_tokens} were asked for" if max_tokens else ""
            raise InvalidRequest(
                f"this model's maximum context length is {self.max_model_len} tokens; "
                f"the prompt has {len(ids)}{asked}",
                code="context_length_exceeded", param=param,
                remedy="shorten the prompt or lower max_tokens",
            )  # fmt: skip
        return ids

    def start(self, request: Body, prompts: Prompts) -> Answer:
        """Hand all choices to the engine. Raises QueueFull or Unavailable, and then nothing runs."""
        n = request.n or 1
        sampling = self.sampling(request, prompts)
        answer = Answer(self.engine, prompts, n)
        generations = [
            Generation(
                id=f"{answer.id}-{index}", prompt=ids, sampling=sampling, n=n, matcher=prompts.matcher,
                stopping=self.stopping(request, prompts, len(ids)),
                deliver=lambda delta, first=index * n: answer.put(shifted(delta, first)),  # type: ignore[misc]
                skip_special_tokens=request.skip_special_tokens and not prompts.reads_marks,
                prompt_logprobs=request.scored,
            )
            for index, ids in enumerate(prompts.ids)
        ]  # fmt: skip
        answer.ids = [generation.id for generation in generations]
        try:
            for generation in generations:
                self.engine.submit(generation)
        except Exception:
            answer.cancel()
            raise
        return answer

    def sampling(self, request: Body, prompts: Prompts) -> Sampling:
        def chosen(name: str, otherwise: float) -> Any:
            value = getattr(request, name)
            return value if value is not None else self.defaults.get(name, otherwise)

        biased = [*(request.logit_bias or {}), *(request.allowed_token_ids or ())]
        if any(not 0 <= token < self.tokenization.vocabulary for token in biased):
            raise InvalidRequest(
                f"a token id is outside of the vocabulary 0..{self.tokenization.vocabulary - 1}",
                param="logit_bias" if request.logit_bias else "allowed_token_ids",
                remedy="use this model's tokens",
            )  # fmt: skip
        return Sampling(
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            top_k=max(chosen("top_k", 0), 0),
            min_p=chosen("min_p", 0.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            logit_bias=request.logit_bias or {},
            allowed_token_ids=tuple(request.allowed_token_ids or ()),
            seed=request.seed,
            top_logprobs=prompts.top_logprobs,
        )

    def stopping(self, request: Body, prompts: Prompts, length: int) -> StopRules:
        room = self.max_model_len - length
        stop = self.defaults.get("stop", ()) if request.stop is None else request.stop
        return StopRules(
            max_tokens=room if prompts.max_tokens is None else min(prompts.max_tokens, room),
            min_tokens=request.min_tokens,
            strings=(stop,) if isinstance(stop, str) else tuple(stop),
            token_ids=self.tokenization.in_vocabulary(request.stop_token_ids or ()),
            ignore_eos=request.ignore_eos,
            include_string=request.include_stop_str_in_output,
        )

    def matcher(self, constraint: Constraint | None) -> Matcher | None:
        """The first one takes time: the tokenizer is read for it. Raises InvalidRequest, naming the field."""
        if constraint is None:
            return None
        with self._grammars_lock:
            if self._grammars is None:
                tokenization = self.tokenization
                self._grammars = Grammars(
                    tokenization.to_json(), tokenization.vocabulary, sorted(tokenization.end_tokens)
                )
        return self._grammars.matcher(constraint)


def shifted(delta: TextDelta, by: int) -> TextDelta:
    """A prompt's choice numbered among those of all prompts."""
    if by == 0:
        return delta
    return replace(delta, index=delta.index + by)


def dispatch(news: list[News]) -> None:
    for generation, delta in news:
        generation.deliver(delta)
