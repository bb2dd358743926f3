"""Metrics under vLLM's names, so that its dashboards and autoscalers fit."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from workers.serving.requests import FinishReason, Generation, Sequence

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
LABELS = ("model_name", "engine")


class ServerMetrics:
    """One registry; the engine and the routes write to it."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self.running = self._made(Gauge, "num_requests_running", "Requests in execution")
        self.waiting = self._made(Gauge, "num_requests_waiting", "Requests that wait")
        self.cache_use = self._made(Gauge, "kv_cache_usage_perc", "Used share of the cache; 1 is all of it")
        self.prompt_tokens = self._made(Counter, "prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._made(Counter, "generation_tokens", "Generated tokens")
        self.preemptions = self._made(Counter, "num_preemptions", "Sequences sent back to wait")
        self._success = Counter(
            "vllm:request_success", "Finished sequences", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._first = self._made(Histogram, "time_to_first_token_seconds", "Arrival to first token", SECONDS)
        self._between = self._made(
            Histogram, "inter_token_latency_seconds", "Between two tokens", TOKEN_SECONDS
        )
        self._whole = self._made(Histogram, "e2e_request_latency_seconds", "Arrival to end", SECONDS)
        self._queued = self._made(Histogram, "request_queue_time_seconds", "Arrival to admission", SECONDS)
        self._prompt_length = self._made(Histogram, "request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._length = self._made(Histogram, "request_generation_tokens", "Tokens of an answer", TOKENS)
        self._max_tokens = self._made(Histogram, "request_params_max_tokens", "max_tokens asked for", TOKENS)
        self._n = self._made(Histogram, "request_params_n", "n asked for", (1, 2, 5, 10, 20))

    def _made(self, kind: Any, name: str, text: str, buckets: tuple[float, ...] = ()) -> Any:
        options = {"buckets": buckets} if buckets else {}
        metric = kind(f"vllm:{name}", text, LABELS, registry=self.registry, **options)
        return metric.labels(**self._labels)

    def decoder(self, path: str, reason: str) -> None:
        """How layers are computed: `native` in one call a step, or `torch`, and why."""
        labels = {"model_name": self._labels["model_name"], "path": path, "reason": reason}
        gauge = Gauge("nibble:decoder_info", "How layers are computed", tuple(labels), registry=self.registry)
        gauge.labels(**labels).set(1)

    def admitted(self, generation: Generation) -> None:
        self._queued.observe(time.monotonic() - generation.arrived)
        self.prompt_tokens.inc(len(generation.prompt))
        self._prompt_length.observe(len(generation.prompt))
        self._max_tokens.observe(generation.stopping.max_tokens)
        self._n.observe(generation.n)

    def token(self, sequence: Sequence) -> None:
        """A token was drawn."""
        now = time.monotonic()
        self.generation_tokens.inc()
        if sequence.last_token_at is None:
            self._first.observe(now - sequence.generation.arrived)
        else:
            self._between.observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._whole.observe(time.monotonic() - sequence.generation.arrived)
        self._length.observe(sequence.generated)

    def text(self) -> bytes:
        return generate_latest(self.registry)
