"""Sends a request with retries, and parses its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from app.client.effects import Call, Flow, Open, Pause, ReadAll, Send
from app.client.errors import foreign, is_passing, json_object, refusal, unreachable
from app.client.retries import Retries
from app.client.views import ServiceAnswer
from app.core.errors import NibbleError

AnswerT = TypeVar("AnswerT", bound=ServiceAnswer)

# No connection was made, so the request was never sent.
UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class Exchange:
    """Sends requests to the service at `url`."""

    url: str
    retries: Retries

    def sent(self, call: Call, *, patience_s: float = 0.0) -> Flow[httpx.Response]:
        """Send a request, retried where that is safe; for `patience_s` also beyond the policy's attempts."""
        return (yield from self.answered(Send(call), patience_s=patience_s))

    def opened(self, call: Open, *, patience_s: float = 0.0) -> Flow[httpx.Response]:
        """As `sent`, but returns once the head of the answer has arrived."""
        return (yield from self.answered(call, patience_s=patience_s))

    def answered(self, ask: Send | Open, *, patience_s: float) -> Flow[httpx.Response]:
        tries, was_lost = 0, False
        give_up = time.monotonic() + patience_s
        while True:
            tries += 1
            try:
                answer: httpx.Response = yield ask
                if answer.is_error and isinstance(ask, Open):
                    yield ReadAll()
            except httpx.TransportError as fault:
                error: NibbleError = unreachable(self.url, fault)
                may_repeat = self.may_repeat(ask.call, fault, is_patient=patience_s > 0)
                was_lost = was_lost or not isinstance(fault, UNSENT)
                cause: BaseException | None = fault
            else:
                if was_lost and ask.call.method == "DELETE" and answer.status_code == httpx.codes.NOT_FOUND:
                    return answer  # an earlier attempt deleted it, and its answer was lost
                if not answer.is_error:
                    return answer
                refused = refusal(answer)
                error, cause = refused, None
                may_repeat = is_passing(refused) and (ask.call.is_repeatable or refused.status == 429)
            pause = self.retries.pause_s(tries, error.retry_after_s)
            is_last = tries >= self.retries.attempts and time.monotonic() + pause > give_up
            if not may_repeat or is_last or pause > self.retries.longest_s:
                raise error from cause
            self.retries.on_pause(error, pause)
            yield Pause(pause)

    def may_repeat(self, call: Call, fault: httpx.TransportError, *, is_patient: bool) -> bool:
        if isinstance(fault, UNSENT):
            return self.retries.refused_connections or is_patient
        return call.is_repeatable

    def read(self, shape: type[AnswerT], call: Call) -> Flow[AnswerT]:
        return parse(shape, (yield from self.sent(call)))

    def document(self, call: Call) -> Flow[dict[str, Any]]:
        answer = yield from self.sent(call)
        document = json_object(answer)
        if not document:
            raise foreign(answer)
        return document

    def done(self, call: Call) -> Flow[None]:
        """Send a request whose answer has no content."""
        yield from self.sent(call)


def parse(shape: type[AnswerT], answer: httpx.Response) -> AnswerT:
    try:
        return shape.model_validate_json(answer.content)
    except ValidationError as fault:
        raise foreign(answer) from fault
