"""The engine: one thread that batches all requests, token by token.

A step reads some tokens of the next prompts and then advances every running sequence by one token. Requests
join and leave between steps, so none waits for another to end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.core.errors import InvalidRequest, NibbleError, QueueFull, Unavailable
from workers.devices.selection import select_device
from workers.serving.batch import Batch, Prefill
from workers.serving.detokenizer import Detokenizer, StopMatch, TokenDecoder
from workers.serving.requests import Choice, FinishReason, Generation, Sequence, TextDelta
from workers.serving.sampling import Drawn, Next, choose
from workers.serving.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

DRAINING = "the server is shutting down"


@dataclass(frozen=True)
class EngineLimits:
    """The most that the engine accepts."""

    max_model_len: int  # tokens of a prompt and its answer
    max_sequences: int  # that run at the same time
    max_waiting: int  # requests beyond those
    max_cells: int  # of the cache: rows times the longest row
    prefill_tokens: int  # of prompts read between two tokens of the running sequences


News = tuple[Generation, TextDelta]


def deliver_here(news: list[News]) -> None:
    """Call the listeners in the engine's own thread."""
    for generation, delta in news:
        generation.deliver(delta)


class Engine:
    """Runs until it is stopped or fails. All public methods may be called from any thread."""

    def __init__(
        self,
        batch: Batch,
        decoder: TokenDecoder,
        limits: EngineLimits,
        metrics: ServerMetrics,
        end_tokens: frozenset[int],
    ) -> None:
        self.batch, self.decoder, self.limits = batch, decoder, limits
        self.metrics, self.end_tokens = metrics, end_tokens
        self.failure: str | None = None
        self.draining = False
        self._arrived = threading.Condition()
        self._waiting: deque[list[Sequence]] = deque()  # sequences that share a prompt
        self._known: dict[str, list[Sequence]] = {}
        self._prefills: list[Prefill] = []
        self._ahead: tuple[list[Sequence], Drawn] | None = None  # of the last step, not yet on the host
        self._outbox: list[News] = []
        self._abandoned: str | None = None
        self.publish: Callable[[list[News]], None] = deliver_here
        self.on_failure: Callable[[], object] = lambda: None  # called by the engine's thread, at its end
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Raises QueueFull if too many wait, and Unavailable if the engine runs no more."""
        sequences = [self._sequence(generation, index) for index in range(generation.n)]
        with self._arrived:
            if self.failure is not None or self.draining:
                raise unavailable(self.failure or DRAINING)
            if len(self._waiting) >= self.limits.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already", remedy="try again later", code="overloaded"
                )
            self._waiting.append(sequences)
            self._known[generation.id] = sequences
            self.metrics.waiting.set(len(self._waiting))
            self._arrived.notify()

    def cancel(self, id: str) -> None:
        """End a request whose caller has disconnected; it gets no further deltas."""
        with self._arrived:
            for sequence in self._known.get(id, ()):
                sequence.cancelled = True
            self._arrived.notify()

    def drain(self) -> None:
        """Accept no more requests; accepted ones continue."""
        with self._arrived:
            self.draining = True
            self._arrived.notify()

    def abandon(self, message: str) -> None:
        """End all running requests with an error."""
        with self._arrived:
            self._abandoned = message
            self._arrived.notify()

    @property
    def idle(self) -> bool:
        return not self._known

    def _sequence(self, generation: Generation, index: int) -> Sequence:
        detokenizer = Detokenizer(
            self.decoder, generation.prompt, skip_special_tokens=generation.skip_special_tokens
        )
        return Sequence(generation, index, detokenizer)

    def _run(self) -> None:
        try:
            select_device(self.batch.device)
            with torch.inference_mode():
                while True:
                    self._await_work()
                    self._step()
        except Exception as error:  # the thread's boundary: every caller must hear of it
            log.exception("the engine failed")
            self._fail(f"the engine failed: {type(error).__name__}: {error}")

    def _await_work(self) -> None:
        with self._arrived:
            while not (self._waiting or self._prefills or self.batch.sequences):
                self._arrived.wait()

    def _step(self) -> None:
        if self._abandoned is not None:
            self._end_all(self._abandoned)
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        self._make_room()
        if self.batch.sequences:
            started, rows = time.monotonic(), len(self.batch.sequences)
            self._advance()
            log.debug("%d rows in %.1f ms", rows, 1000 * (time.monotonic() - started))
        self.metrics.running.set(len(self.batch.sequences) + sum(len(p.sequences) for p in self._prefills))
        self.metrics.cache_use.set(min(self.batch.cache.cells / self.limits.max_cells, 1.0))

    def _advance(self) -> None:
        """One step for all rows. While it runs, the tokens of the step before are read and sent."""
        if self._ahead is not None and all(map(self._near_limit, self.batch.sequences)):
            self._settle()
            self._leave_finished()
        rows = list(self.batch.sequences)
        if rows:
            logits = self.batch.advance()
            drawn = self.batch.draw_ahead(logits)
            self._settle()
            if drawn is None:
                self._continue(rows, logits)
            else:
                self._ahead = rows, drawn
            self._leave_finished()
        self._publish()

    def _settle(self) -> None:
        """Give the sequences of the last step the tokens that the device drew for them."""
        if self._ahead is not None:
            (sequences, drawn), self._ahead = self._ahead, None
            self._extend(sequences, drawn.choices())

    def _near_limit(self, sequence: Sequence) -> bool:
        """Whether the token that is on its way is the last one that is asked for."""
        return sequence.finished or sequence.generated + 1 >= sequence.stopping.max_tokens

    def _drop_cancelled(self) -> None:
        with self._arrived:
            for group in [group for group in self._waiting if all(s.cancelled for s in group)]:
                self._waiting.remove(group)
                self._forget(group)
            self.metrics.waiting.set(len(self._waiting))
        for prefill in [p for p in self._prefills if all(s.cancelled for s in p.sequences)]:
            self._prefills.remove(prefill)
            self._forget(prefill.sequences)
        for sequence in self.batch.sequences:
            if sequence.cancelled and not sequence.finished:
                self._end(TextDelta(sequence.index, "", (), "abort"), sequence)
        self._leave_finished()

    def _admit(self) -> None:
        """Start on prompts while there is room for their rows. More rows than there are come in turns."""
        with self._arrived:
            while self._waiting:
                group = self._waiting[0]
                rows = len(self.batch.sequences) + sum(len(p.sequences) for p in self._prefills)
                longest = max(
                    len(group[0].tokens) + 1,
                    self.batch.cache.window.width,
                    *(len(p.tokens) for p in self._prefills),
                )
                room = min(self.limits.max_sequences, self.batch.cache.room(longest)) - rows
                if room < len(group) and rows:
                    return
                self._waiting.popleft()
                taken, later = group[: max(room, 1)], group[max(room, 1) :]
                if later:
                    self._waiting.appendleft(later)
                self._prefills.append(Prefill(taken))
                first = taken[0]
                if first.index == 0 and not first.generated:  # else the request was here before
                    self.metrics.admitted(first.generation)
            self.metrics.waiting.set(len(self._waiting))

    def _read_prompts(self) -> None:
        budget = self.limits.prefill_tokens
        while self._prefills and budget > 0:
            together = self.batch.only_scored(self._prefills, budget)
            if together:
                budget -= sum(len(prefill.tokens) for prefill in together)
                for prefill, logits in zip(together, self.batch.score_together(together), strict=True):
                    self._begin(prefill, logits)
                continue
            prefill = self._prefills[0]
            before = prefill.left
            end = self.batch.read(prefill, budget)
            budget -= before - prefill.left
            if end is not None:
                self._begin(prefill, end)

    def _begin(self, prefill: Prefill, logits: Tensor) -> None:
        """The first token of the sequences of a prompt that was read, by its logits (1, vocabulary)."""
        self._prefills.remove(prefill)
        for sequence in prefill.sequences:
            sequence.prompt_scores = tuple(prefill.scores) if prefill.scored else None
        if prefill.sequences[0].stopping.max_tokens:
            self._continue(prefill.sequences, logits.expand(len(prefill.sequences), -1))
        else:
            for sequence in prefill.sequences:
                self._finish(sequence, "length")
        staying = [sequence for sequence in prefill.sequences if not sequence.finished]
        if self._fits(len(staying), len(prefill.tokens)):
            self.batch.join(prefill)
        else:
            self._send_back(staying)
        self._publish()

    def _fits(self, rows: int, width: int) -> bool:
        """Whether a step with so many rows more, of that width, has room; the first ones always have."""
        window = self.batch.cache.window
        return not window.rows or window.rows + rows <= self.batch.cache.room(max(width, window.width) + 1)

    def _make_room(self) -> None:
        """Send the youngest sequences back to wait when the cache is full; they are read again later."""
        while len(self.batch.sequences) > 1 and not self._fits(0, 0):
            self._settle()
            youngest = max(
                range(len(self.batch.sequences)), key=lambda row: self.batch.sequences[row].generation.arrived
            )
            sequence = self.batch.leave(youngest)
            if not sequence.finished:
                self._send_back([sequence])

    def _send_back(self, sequences: list[Sequence]) -> None:
        self.metrics.preemptions.inc(len(sequences))
        with self._arrived:
            self._waiting.extendleft([sequence] for sequence in reversed(sequences))

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Give each sequence its next token, chosen from float32 logits (sequences, vocabulary)."""
        self._extend(sequences, choose(logits, sequences, self.end_tokens))

    def _extend(self, sequences: list[Sequence], choices: list[Next]) -> None:
        for sequence, choice in zip(sequences, choices, strict=True):
            if sequence.cancelled or sequence.finished:
                continue
            if isinstance(choice, NibbleError):
                self._end(error_delta(sequence, choice), sequence)
            elif choice is None:
                self._finish(sequence, "stop")
            else:
                self._take(sequence, choice)

    def _take(self, sequence: Sequence, choice: Choice) -> None:
        stopping, token = sequence.stopping, choice.token
        try:
            sequence.add(choice)
        except InvalidRequest as fault:  # the grammar is beyond its limits
            self._end(error_delta(sequence, fault), sequence)
            return
        self.metrics.token(sequence)
        enough = sequence.generated >= stopping.min_tokens
        if enough and token in self.end_tokens and not stopping.ignore_eos:
            self._finish(sequence, "stop")
        elif enough and token in stopping.token_ids:
            self._finish(sequence, "stop", stop_reason=token)
        else:
            self._append_text(sequence, sequence.detokenizer.add(token), enough=enough)

    def _append_text(self, sequence: Sequence, added: str, *, enough: bool) -> None:
        text = sequence.stops.add(added) if enough else added
        if isinstance(text, StopMatch):
            self._finish(sequence, "stop", text=text.text, stop_reason=text.string, withheld=False)
        elif sequence.matcher is not None and sequence.matcher.complete:
            self._finish(sequence, "stop", text=text)
        elif self._at_limit(sequence):
            self._finish(sequence, "length", text=text)
        elif text:
            self._deliver(sequence, TextDelta(sequence.index, text, ()))

    def _at_limit(self, sequence: Sequence) -> bool:
        long = len(sequence.tokens) >= self.limits.max_model_len
        return long or sequence.generated >= sequence.stopping.max_tokens

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        text: str = "",
        stop_reason: int | str | None = None,
        withheld: bool = True,
    ) -> None:
        """End a sequence, with the text that was withheld until now."""
        if withheld and reason != "error":
            rest = sequence.stops.add(sequence.detokenizer.rest())
            if isinstance(rest, StopMatch):  # completed by a character that was incomplete until now
                reason, stop_reason, text = "stop", rest.string, text + rest.text
            else:
                text += rest + sequence.stops.rest()
        self._end(TextDelta(sequence.index, text, (), reason, stop_reason), sequence)

    def _end(self, delta: TextDelta, sequence: Sequence) -> None:
        sequence.finished = True
        reason = delta.finish_reason
        assert reason is not None
        self.metrics.finished(sequence, reason)
        if reason != "abort":
            self._deliver(sequence, delta)
        group = self._known.get(sequence.generation.id, [])
        if all(each.finished or each.cancelled for each in group):
            self._forget(group)

    def _deliver(self, sequence: Sequence, delta: TextDelta) -> None:
        delta = replace(delta, choices=tuple(sequence.pending), prompt_scores=sequence.prompt_scores)
        self._outbox.append((sequence.generation, delta))
        sequence.pending, sequence.prompt_scores = [], None

    def _publish(self) -> None:
        if self._outbox:
            news, self._outbox = self._outbox, []
            self.publish(news)

    def _leave_finished(self) -> None:
        for row in reversed(range(len(self.batch.sequences))):
            if self.batch.sequences[row].finished:
                self.batch.leave(row)

    def _forget(self, group: list[Sequence]) -> None:
        for sequence in group:
            self._known.pop(sequence.generation.id, None)

    def _fail(self, message: str) -> None:
        with self._arrived:
            self.failure = message
        self._end_all(message)
        self.metrics.running.set(0)
        self.on_failure()

    def _end_all(self, message: str) -> None:
        with self._arrived:
            groups = list(self._known.values())
            self._waiting.clear()
        self._prefills.clear()
        for sequence in [sequence for group in groups for sequence in group if not sequence.finished]:
            self._end(error_delta(sequence, unavailable(message)), sequence)
        self._publish()
        self.metrics.waiting.set(0)


def error_delta(sequence: Sequence, error: NibbleError) -> TextDelta:
    return TextDelta(sequence.index, "", (), "error", error=error)


def unavailable(message: str) -> Unavailable:
    """The error for every caller of an engine that has failed or shuts down."""
    return Unavailable(message, code="engine_unavailable", remedy="try again")
