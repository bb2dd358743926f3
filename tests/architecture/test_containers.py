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


def test_compose_gives_secrets_as_files_only() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        assert not [name for name in service.get("environment", {}) if "KEY" in name or "PASSWORD" in name]
    used = {each if isinstance(each, str) else each["source"]
            for service in compose["services"].values() for each in service.get("secrets", [])}  # fmt: skip
    assert used == set(compose["secrets"])


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


def test_the_autoscaler_reads_the_queues_that_exist() -> None:
    from app.core.jobs.job_queue import QUEUE_NAMES

    documents = yaml.safe_load_all((DOCKER / "kubernetes" / "autoscaling.yaml").read_text())
    scaled = next(each for each in documents if each["kind"] == "ScaledObject")
    lists = {trigger["metadata"]["listName"] for trigger in scaled["spec"]["triggers"]}
    assert lists == {f"rq:queue:{name}" for name in QUEUE_NAMES}


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
