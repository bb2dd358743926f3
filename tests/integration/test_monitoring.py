"""The alert rules and the Grafana dashboard speak of metrics, labels and values that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import MatchOp, VectorSelector

from app.core.deployments.deployment import DeploymentSpec, Goal, Replica, ReplicaState
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.records.job import JobState, Problem
from app.core.telemetry.tally import Tally
from tests.integration.api_service import Service

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
OWN = frozenset({"up"})  # what Prometheus itself makes
# Values that need a fault to be seen: those that the code knows.
RARE = {("status", "429"), ("outcome", "failed"), ("job", "nibble")}


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    board = json.loads((MONITORING / "grafana" / "dashboards" / "nibble.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    return found | {
        f"{panel['id']} {panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }


def selectors(node: object) -> Iterator[VectorSelector]:
    """Every series that an expression reads."""
    if isinstance(node, VectorSelector):
        yield node
        return
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


@pytest.fixture
def samples(service: Service) -> dict[str, list[dict[str, str]]]:
    """The labels of each sample of `/metrics`, after a little of everything has happened."""
    job = service.submit()["id"]
    error = Problem(code="out_of_memory", message="m")
    service.end(job, JobState.FAILED, error=error)
    service.submit(force=True)
    artifact = service.publish(job, {"config.json": b"{}"})
    spec = DeploymentSpec(artifact=artifact.id, name="tiny")
    DeploymentStore(service.redis).create("default", spec)
    Tally(service.redis).add_stage("searching", 2.0)
    now = datetime.now(UTC)
    record = WorkerRecord(
        name="w", host="h", pid=1, device="cuda:0", memory_bytes=5, started_at=now, heartbeat_at=now
    )
    WorkerRegistry(service.redis).beat(record, ttl_s=60)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    service.client.post("/v1/chat/completions", json=asked)
    service.client.get("/nowhere")
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(service.client.get("/metrics").text):
        suffixes = {
            "counter": ["_total"],
            "histogram": ["_bucket", "_sum", "_count"],
            "summary": ["_sum", "_count"],
        }
        for suffix in suffixes.get(family.type, [""]):
            found[family.name + suffix] = []
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_every_expression_reads_what_exists(samples: dict[str, list[dict[str, str]]]) -> None:
    read = set()
    for where, expression in expressions().items():
        for selector in selectors(promql_parser.parse(expression)):
            assert selector.name is not None
            read.add(selector.name)
            if selector.name in OWN:
                continue
            assert selector.name in samples, f"{where}: there is no {selector.name}"
            for matcher in selector.matchers.matchers:
                labels = samples[selector.name]
                require_label(where, labels, matcher)
    gone = {
        "nibble_http_requests_created",
        "nibble_http_request_seconds_sum",
        "nibble_http_request_seconds_count",
    }
    unread = {name for name in samples if not name.endswith("_created")} - read - gone
    assert {name for name in unread if not name.endswith(("_sum", "_count"))} == set(), "shown nowhere"


def require_label(where: str, labels: list[dict[str, str]], matcher: Any) -> None:
    """The label exists, and one of its values is met where the matcher names values."""
    if labels:
        assert all(matcher.name in each for each in labels), f"{where}: no label {matcher.name}"
    if matcher.op not in (MatchOp.Equal, MatchOp.Re) or (matcher.name, matcher.value) in RARE:
        return
    pattern = matcher.value if matcher.op == MatchOp.Re else re.escape(matcher.value)
    values = {each[matcher.name] for each in labels}
    if matcher.value != "5..":  # no fault of the service has happened
        assert any(re.fullmatch(pattern, value) for value in values), (
            f"{where}: {matcher.name}={matcher.value}"
        )


def test_grouped_labels_exist(samples: dict[str, list[dict[str, str]]]) -> None:
    for where, expression in expressions().items():
        grouped = set(re.findall(r"[a-z]+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))) - {"le"}
        known = {
            label for selector in selectors(promql_parser.parse(expression))
            for labels in samples.get(selector.name or "", []) for label in labels
        }  # fmt: skip
        read = [selector.name or "" for selector in selectors(promql_parser.parse(expression))]
        if all(samples.get(name) for name in read if name not in OWN):
            assert grouped <= known, where


def test_a_deployments_load_is_one_reading(service: Service) -> None:
    """An autoscaler divides one of these by another: each deployment has all of them, under one label."""
    artifact = service.publish(service.submit()["id"], {"config.json": b"{}"})
    store = DeploymentStore(service.redis)
    busy = store.create("default", DeploymentSpec(artifact=artifact.id, name="busy", replicas=2))
    rests = store.create("other", DeploymentSpec(artifact=artifact.id, name="rests"))
    store.update(rests.id, lambda before: before.model_copy(update={"goal": Goal.REST}))
    now = datetime.now(UTC)
    for slot, (state, running, waiting) in enumerate(
        [(ReplicaState.READY, 3, 2), (ReplicaState.LOADING, 0, 0)]
    ):
        replica = Replica(
            deployment=busy.id, slot=slot, owner="o", worker="w", engine="transformers", state=state,
            url="http://127.0.0.1:9", running=running, waiting=waiting, since=now,
        )  # fmt: skip
        assert store.beat(replica, ttl_s=30)
    shown: dict[str, dict[str, float]] = {}
    for each in text_string_to_metric_families(service.client.get("/metrics").text):
        if each.name.startswith("nibble_deployment_"):
            shown[each.name] = {sample.labels["deployment"]: sample.value for sample in each.samples}
            assert all(sample.labels.keys() == {"deployment"} for sample in each.samples)
    assert shown == {
        "nibble_deployment_running": {busy.id: 3, rests.id: 0},
        "nibble_deployment_waiting": {busy.id: 2, rests.id: 0},
        "nibble_deployment_replicas": {busy.id: 2, rests.id: 0},
        "nibble_deployment_ready": {busy.id: 1, rests.id: 0},
    }


def test_the_shipped_configuration_finds_the_servers(service: Service, repository: Path) -> None:
    """By Prometheus' HTTP service discovery, with the key that compose gives it."""
    shipped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = [each for each in shipped["scrape_configs"] if each["job_name"] == "nibble-servers"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["authorization"] == job["authorization"]
    key_file = Path(job["authorization"]["credentials_file"])
    compose = yaml.safe_load((repository / "docker-compose.yml").read_text())["services"]["prometheus"]
    assert {"source": "api_key", "target": key_file.name} in compose["secrets"]
    assert key_file.parent == Path("/run/secrets")
    artifact = service.publish(service.submit()["id"], {"config.json": b"{}"})
    deployment = DeploymentStore(service.redis).create(
        "default", DeploymentSpec(artifact=artifact.id, name="tiny")
    )
    replica = Replica(
        deployment=deployment.id, slot=0, owner="o", worker="w", engine="transformers",
        state=ReplicaState.READY, url="http://127.0.0.1:9", since=datetime.now(UTC),
    )  # fmt: skip
    assert DeploymentStore(service.redis).beat(replica, ttl_s=30)
    answer = service.client.get(httpx.URL(discovery["url"]).path)
    assert answer.headers["content-type"] == "application/json"  # Prometheus takes no other
    (group,) = answer.json()
    assert group.keys() == {"targets", "labels"}
    assert group["targets"] == [httpx.URL(service.url).netloc.decode()]
    assert all(re.fullmatch(r"[a-z_]+", name) for name in group["labels"])
    assert all(isinstance(value, str) for value in group["labels"].values())
    path = group["labels"]["__metrics_path__"]
    assert path == f"/v1/deployments/{deployment.id}/servers/0/metrics"
    assert service.client.get(path).status_code != 404


def test_every_alert_has_a_remedy_here_and_in_the_documentation(repository: Path) -> None:
    page = (repository / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"^\| `(Nibble\w+)` \|", page, re.MULTILINE))
    assert documented == {rule["alert"] for rule in rules()}
    for rule in rules():
        assert rule["annotations"].keys() == {"summary", "remedy"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_is_in_order() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len({panel["id"] for panel in panels()}) == len(titles) > 15
    for panel in panels():
        assert panel["description"], panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is not on PATH")
def test_promtool_agrees() -> None:
    for arguments in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts.test.yml")):
        command = ["promtool", *arguments]
        checked = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
