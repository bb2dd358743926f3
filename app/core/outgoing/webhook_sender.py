"""Sends webhooks that are due, from threads of each API process.

A taken message is reserved for a minute. If the process dies meanwhile, the message is due again and is sent
under the same id.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import httpx

from app.core.errors import NibbleError
from app.core.outgoing.address_guard import OutgoingGuard, guarded_client
from app.core.outgoing.webhook_messages import Delivery, DeliveryStore, WebhookSecrets, WebhookTry, signature

log = logging.getLogger(__name__)

# Seconds after each failed try; after the last one the message counts as failed.
DELAYS_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)
JITTER = 0.2
LIMIT_S = 10.0
HOLD_S = 60.0
MAX_ANSWER_BYTES = 64 * 1024
PARALLEL = 4  # so that a slow receiver holds up one of them
GONE = 410  # the receiver wants no more

OnOutcome = Callable[[str], None]


class WebhookSender:
    """Sends one message at a time; `on_outcome` gets delivered, retried or failed."""

    def __init__(
        self,
        store: DeliveryStore,
        secrets: WebhookSecrets,
        guard: OutgoingGuard,
        *,
        on_outcome: OnOutcome = lambda outcome: None,
        delays_s: Sequence[float] = DELAYS_S,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._guard = guard
        self._on_outcome = on_outcome
        self._delays_s = delays_s

    def send_due(self) -> bool:
        """Send one message; False if none is due."""
        delivery = self._store.take(hold_s=HOLD_S)
        if delivery is None:
            return False
        tried = self._try(delivery)
        tries = (*delivery.tries, tried)
        again_in_s = self._delay(tried, len(tries))
        state = "delivered" if is_success(tried) else "pending" if again_in_s is not None else "failed"
        self._store.write(delivery.model_copy(update={"tries": tries, "state": state}), again_in_s=again_in_s)
        self._on_outcome("retried" if state == "pending" else state)
        log.info("webhook %s of %s: %s (%s)", delivery.id, delivery.job, state, tried.status or tried.error)
        return True

    def _delay(self, tried: WebhookTry, count: int) -> float | None:
        if is_success(tried) or tried.status == GONE or count > len(self._delays_s):
            return None
        return self._delays_s[count - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # no secret

    def _try(self, delivery: Delivery) -> WebhookTry:
        started, at = time.monotonic(), datetime.now(UTC)
        status, error = None, None
        try:
            status = self._post(delivery, started)
        except (httpx.HTTPError, httpx.InvalidURL, NibbleError, TimeoutError) as fault:
            # The class alone: messages of connection errors would reveal the inner network.
            error = fault.code if isinstance(fault, NibbleError) else type(fault).__name__
        return WebhookTry(at=at, status=status, error=error, seconds=round(time.monotonic() - started, 3))

    def _post(self, delivery: Delivery, started: float) -> int:
        headers = self._headers(delivery)
        with (
            guarded_client(self._guard, timeout=LIMIT_S) as client,
            client.stream("POST", delivery.url, content=delivery.body, headers=headers) as answer,
        ):
            received = 0
            for chunk in answer.iter_raw():
                received += len(chunk)
                if received > MAX_ANSWER_BYTES or time.monotonic() - started > LIMIT_S:
                    break  # its status is known: nobody reads the rest
            return answer.status_code

    def _headers(self, delivery: Delivery) -> dict[str, str]:
        timestamp = int(time.time())
        signatures = [
            signature(secret, delivery.id, timestamp, delivery.body)
            for secret in self._secrets.of(delivery.tenant)
        ]
        return {
            "Content-Type": "application/json",
            "User-Agent": "nibble-webhooks",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signatures),
        }


def is_success(tried: WebhookTry) -> bool:
    return tried.status is not None and 200 <= tried.status < 300
