"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.core.janitor import STEPS

FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Occupancy(NamedTuple):
    """How full the service is at one moment."""

    jobs: dict[str, int]  # by state
    queues: dict[str, int]  # by name
    workers: dict[str, int]  # by what they do: busy, idle
    deployments: dict[str, int]  # by state
    replicas: dict[str, int]  # by state


class OccupancyCollector(Collector):
    """Reads the occupancy when it is asked for, so that every API process gives the same answer."""

    def __init__(self, read: Callable[[], Occupancy]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []  # keeps registration from reading

    def collect(self) -> Iterator[Metric]:
        occupancy = self._read()
        yield family("nibble_jobs", "Jobs by state.", "state", occupancy.jobs)
        yield family("nibble_queue_depth", "Jobs that wait for a worker.", "queue", occupancy.queues)
        yield family("nibble_workers", "Living workers.", "state", occupancy.workers)
        yield family("nibble_deployments", "Deployments by state.", "state", occupancy.deployments)
        yield family("nibble_replicas", "Servers of deployments.", "state", occupancy.replicas)


def family(name: str, documentation: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    metric = GaugeMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        metric.add_metric([value], count)
    return metric


class Metrics:
    """The metrics of one application: a registry of its own, so that two can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "nibble_http_requests", "Requests.", ["method", "route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "nibble_http_request_seconds", "Time to the end of the answer.", ["route"], registry=self.registry
        )
        self._in_flight = Gauge(
            "nibble_http_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self._janitor = Counter(
            "nibble_janitor_steps", "Lost jobs set right, by what was done.", ["step"], registry=self.registry
        )
        self._webhooks = Counter(
            "nibble_webhooks", "Webhooks sent, by outcome.", ["outcome"], registry=self.registry
        )
        for step in STEPS:
            self._janitor.labels(step)

        self._inference = Counter(
            "nibble_inference_requests",
            "Relayed requests; 499: the caller left, 502: the server ended amid a stream.",
            ["deployment", "status"],
            registry=self.registry,
        )
        self._retries = Counter(
            "nibble_inference_retries",
            "Requests that a second replica was asked for.",
            ["deployment"],
            registry=self.registry,
        )
        self._first_bytes = Histogram(
            "nibble_inference_first_byte_seconds",
            "Time to a server's first bytes.",
            ["deployment"],
            buckets=FIRST_BYTE_BUCKETS,
            registry=self.registry,
        )

    def observe_occupancy(self, read: Callable[[], Occupancy]) -> None:
        self.registry.register(OccupancyCollector(read))

    def request_begins(self) -> None:
        self._in_flight.inc()

    def request_ends(self, method: str, route: str, status: int, seconds: float) -> None:
        self._in_flight.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def inference_ends(self, deployment: str, status: int) -> None:
        self._inference.labels(deployment, str(status)).inc()

    def inference_retried(self, deployment: str) -> None:
        self._retries.labels(deployment).inc()

    def first_byte(self, deployment: str, seconds: float) -> None:
        self._first_bytes.labels(deployment).observe(seconds)

    def janitor_step(self, step: str) -> None:
        self._janitor.labels(step).inc()

    def webhook_outcome(self, outcome: str) -> None:
        self._webhooks.labels(outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
