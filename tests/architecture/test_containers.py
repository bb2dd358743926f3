"""What can be checked of images and manifests without an engine that runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
MANIFESTS = sorted(
    path
    for path in (DOCKER / "kubernetes").glob("*.yaml")
    if path.name not in ("kustomization.yaml", "autoscaling.yaml")
)
TOOLS = Path(sys.executable).parent
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **environment}, cwd=REPOSITORY,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["api.Dockerfile", "worker.Dockerfile"])
def test_images_pass_hadolint(name: str) -> None:
    found = run(TOOLS / "hadolint", "--failure-threshold", "info", DOCKER / name)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["api.Dockerfile", "worker.Dockerfile"])
def test_images_are_pinned_and_not_root(name: str) -> None:
    lines = (DOCKER / name).read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001"
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_the_api_image_holds_no_torch() -> None:
    assert "torch" not in (DOCKER / "api.Dockerfile").read_text().replace("without torch", "")


def test_compose_follows_its_specification() -> None:
    found = run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert found.returncode == 0, found.stdout


def test_compose_lint_has_only_to_say_what_is_decided() -> None:
    """docs/decisions.md says why."""
    result = run(
        TOOLS / "compose-lint", "check", "--format", "json", "--fail-on", "low", "docker-compose.yml"
    )
    findings = json.loads(result.stdout)["findings"]
    images = {("CL-0019", name) for name, service in COMPOSE["services"].items() if "image" in service}
    workers = {("CL-0026", name) for name in ("worker", "server", "worker-gpu", "server-gpu")}
    assert {(each["rule_id"], each["service"]) for each in findings} == images | workers


def test_compose_gives_secrets_as_files_only() -> None:
    for service in COMPOSE["services"].values():
        assert not [name for name in service.get("environment", {}) if "KEY" in name or "PASSWORD" in name]
    used = {each if isinstance(each, str) else each["source"]
            for service in COMPOSE["services"].values() for each in service.get("secrets", [])}  # fmt: skip
    assert used == set(COMPOSE["secrets"])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_containers_are_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "/tmp" in service["tmpfs"]
    assert service["mem_limit"]
    assert "cpus" in service
    assert service["pids_limit"] > 0
    published = [str(port) for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_containers_of_pods_are_confined(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        pod = document.get("spec", {}).get("template", {}).get("spec")
        if pod is None:
            continue
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas_of_kubernetes(path: Path) -> None:
    found = run(TOOLS / "kubernetes-validate", "--strict", path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_probes_have_their_own_port_and_time_to_be_answered() -> None:
    """Kubernetes' default of one second ends pods that are only busy."""
    documents = yaml.safe_load_all((DOCKER / "kubernetes" / "api.yaml").read_text())
    pod = next(each for each in documents if each["kind"] == "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["NIBBLE_PROBE_PORT"] == str(ports["probes"])
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["probes"])
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    assert probes.keys() == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["httpGet"]["port"] == "probes"
        assert probe["timeoutSeconds"] >= 5


def test_health_checks_of_images_fit_their_ports_and_limits() -> None:
    image = (DOCKER / "api.Dockerfile").read_text()
    (port,) = re.findall(r"NIBBLE_PROBE_PORT=(\d+)", image)
    (outer,) = re.findall(r"HEALTHCHECK .*--timeout=(\d+)s", image)
    (asked, inner) = re.findall(r"http://127.0.0.1:(\d+)/readyz', timeout=(\d+)", image)[0]
    assert asked == port
    assert 5 <= int(inner) < int(outer)
    prometheus = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [f"api:{port}"]


def test_every_manifest_is_in_the_kustomization() -> None:
    listed = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {path.name for path in MANIFESTS} | {"autoscaling.yaml"}


def test_the_autoscaler_reads_what_waits_and_may_read_it() -> None:
    from app.core.changes.redis_keys import state_key
    from app.core.records.job import JobState

    documents = yaml.safe_load_all((DOCKER / "kubernetes" / "autoscaling.yaml").read_text())
    scaled = next(each for each in documents if each["kind"] == "ScaledObject")
    (name,) = {trigger["metadata"]["listName"] for trigger in scaled["spec"]["triggers"]}
    assert name == state_key(JobState.QUEUED)
    user = (DOCKER / "kubernetes" / "README.md").read_text().partition("user nibble-scaler")[2]
    assert f'~{name}"' in user
    assert "+eval +type +llen +scard" in user


def test_servers_follow_a_metric_that_there_is() -> None:
    from app.api.metrics import LOAD_METRICS

    documents = yaml.safe_load_all((DOCKER / "kubernetes" / "autoscaling.yaml").read_text())
    scaled = next(each for each in documents if each["metadata"]["name"] == "nibble-server")
    server = yaml.safe_load((DOCKER / "kubernetes" / "server.yaml").read_text())
    assert scaled["spec"]["scaleTargetRef"]["name"] == server["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    (name,) = re.findall(r"nibble_deployment_(\w+)", trigger["metadata"]["query"])
    assert name in LOAD_METRICS


def test_the_entry_point_turns_files_into_settings(tmp_path: Path) -> None:
    secrets, programs = tmp_path / "secrets", tmp_path / "bin"
    secrets.mkdir()
    programs.mkdir()
    (secrets / "NIBBLE_REDIS_URL").write_text("redis://a b\n")
    (secrets / "NIBBLE_PORT").write_text("1")
    (secrets / "PATH").write_text("/elsewhere")
    stand_in = programs / "nibble"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    stand_in.chmod(0o755)
    answer = run(
        DOCKER / "entrypoint.sh", "api", "--flag",
        PATH=f"{programs}:/usr/bin:/bin", NIBBLE_SECRETS_DIR=str(secrets), NIBBLE_PORT="2",
    )  # fmt: skip
    arguments, environment = json.loads(answer.stdout)
    assert arguments == ["api", "--flag"]
    assert environment["NIBBLE_REDIS_URL"] == "redis://a b"
    assert environment["NIBBLE_PORT"] == "2"
    assert environment["PATH"].startswith(str(programs))
