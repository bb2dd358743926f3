"""The Prometheus metrics of `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from app.core.telemetry.tally import StageTotal
from app.core.upkeep.janitor import STEPS

LOAD_METRICS = {
    "running": "Requests that the deployment's servers answer.",
    "waiting": "Requests that its servers have accepted and not begun.",
    "replicas": "Servers that it shall have; one more amid a replacement, 0 while nothing is served.",
    "ready": "Servers that answer.",
}
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class DeploymentLoad(NamedTuple):
    """What an autoscaler of one deployment needs, all from one reading."""

    running: int  # requests that its servers answer
    waiting: int  # that they have accepted and not begun
    replicas: int  # wanted; 0 while it rests or can't be served
    ready: int  # that answer


class Occupancy(NamedTuple):
    """The service's load at one moment."""

    jobs: dict[str, int]  # by state
    queues: dict[str, int]  # by name
    workers: dict[str, int]  # by status: busy, idle
    deployments: dict[str, int]  # by state
    replicas: dict[str, int]  # by state
    loads: dict[str, DeploymentLoad]  # by deployment
    oldest_s: float  # age of the oldest queued job
    heartbeats_s: dict[str, float]  # seconds since the last heartbeat, by worker
    gpu_bytes: dict[str, float]  # of the workers' GPUs in use, by worker
    stages: dict[str, StageTotal]
    failures: dict[str, int]  # jobs by code


class OccupancyCollector(Collector):
    """Reads the occupancy at each scrape, so that every API process answers the same."""

    def __init__(self, read: Callable[[], Occupancy]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []  # an empty description: registering must not read Redis

    def collect(self) -> Iterator[Metric]:
        occupancy = self._read()
        yield family("nibble_jobs", "Jobs by state.", "state", occupancy.jobs)
        yield family("nibble_queue_depth", "Entries; further jobs are in line.", "queue", occupancy.queues)
        yield family("nibble_workers", "Live workers.", "state", occupancy.workers)
        yield family("nibble_deployments", "Deployments by state.", "state", occupancy.deployments)
        oldest = GaugeMetricFamily("nibble_queue_oldest_seconds", "Age of the oldest queued job.")
        oldest.add_metric([], occupancy.oldest_s)
        yield oldest
        heartbeats, memory = occupancy.heartbeats_s, occupancy.gpu_bytes
        yield family("nibble_worker_heartbeat_age_seconds", "Since the last.", "worker", heartbeats)
        yield family("nibble_gpu_memory_used_bytes", "Of the worker's GPU.", "worker", memory)
        yield stage_summary(occupancy.stages)
        failures = CounterMetricFamily("nibble_job_failures", "Failed jobs by code.", labels=["code"])
        for code, count in occupancy.failures.items():
            failures.add_metric([code], count)
        yield failures
        yield family("nibble_replicas", "Servers of deployments.", "state", occupancy.replicas)
        for field, documentation in LOAD_METRICS.items():
            values = {name: getattr(load, field) for name, load in occupancy.loads.items()}
            yield family(f"nibble_deployment_{field}", documentation, "deployment", values)


def stage_summary(stages: dict[str, StageTotal]) -> SummaryMetricFamily:
    metric = SummaryMetricFamily("nibble_stage_seconds", "Time that jobs spent in a stage.", labels=["stage"])
    for stage, total in stages.items():
        metric.add_metric([stage], total.times, total.seconds)
    return metric


def family(name: str, documentation: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    metric = GaugeMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        metric.add_metric([value], count)
    return metric


class Metrics:
    """The metrics of one application, in its own registry so that one process can hold several."""

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
            "nibble_janitor_steps", "Lost jobs repaired, by action.", ["step"], registry=self.registry
        )
        self._webhooks = Counter(
            "nibble_webhooks", "Webhooks sent, by outcome.", ["outcome"], registry=self.registry
        )
        for step in STEPS:
            self._janitor.labels(step)

        self._inference = Counter(
            "nibble_inference_requests",
            "Relayed requests; 499: the caller disconnected, 502: the server died during a stream.",
            ["deployment", "status"],
            registry=self.registry,
        )
        self._retries = Counter(
            "nibble_inference_retries",
            "Requests that were retried on a second replica.",
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
