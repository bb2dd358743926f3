"""Tags that point to one version of a model, the versions of each model, and exports of jobs."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.core.access.api_keys import Scope
from app.core.records.artifact import ArtifactManifest
from app.core.records.job import JobState
from tests.integration.api_service import MODEL, Service

TAGGED = f"{MODEL}@production"


@pytest.fixture
def versions(service: Service) -> tuple[ArtifactManifest, ArtifactManifest]:
    """Two artifacts of one model, older first."""
    created = []
    for _ in range(2):
        job = service.submit(force=True)
        created.append(service.publish(job["id"], {"model.safetensors": b"weights"}))
        service.end(job["id"], artifacts=(created[-1].id,))
    return created[0], created[1]


def patched(service: Service, art_id: str, **body: Any) -> list[str]:
    answer = service.client.patch(f"/v1/artifacts/{art_id}", json=body)
    assert answer.status_code == 200, answer.text
    tags: list[str] = answer.json()["tags"]
    return tags


def tags_of(service: Service, manifest: ArtifactManifest) -> list[str]:
    tags: list[str] = service.client.get(f"/v1/artifacts/{manifest.id}").json()["tags"]
    return tags


def test_a_tag_moves_between_the_versions_of_a_model(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    old, new = versions
    assert patched(service, old.id, tags=["production", "v1"]) == ["production", "v1"]
    assert patched(service, new.id, add_tags=["production"]) == ["production"]
    assert tags_of(service, old) == ["v1"]
    listed = service.client.get("/v1/artifacts", params={"tag": "production"}).json()["data"]
    assert [each["id"] for each in listed] == [new.id]
    assert service.client.get("/v1/artifacts", params={"tag": "nobodys"}).json()["data"] == []
    assert patched(service, new.id, remove_tags=["production", "v1"]) == []
    assert tags_of(service, old) == ["v1"], "a tag of another artifact is not this one's to remove"
    details = [entry["detail"] for entry in service.client.get("/v1/audit").json()["data"]]
    assert f"{TAGGED}: {old.id} -> {new.id}" in details
    assert f"{TAGGED}: {new.id} -> none" in details


def test_of_many_who_move_a_tag_one_has_it(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: patched(service, versions[index % 2].id, add_tags=["x"]), range(16)))
    assert sorted(len(tags_of(service, each)) for each in versions) == [0, 1]


@pytest.mark.parametrize(
    "body",
    [
        {"tags": ["with space"]}, {"tags": ["-x"]}, {"tags": ["a"], "add_tags": ["b"]}, {"tags": ["a@b"]},
        {"add_tags": ["a"], "remove_tags": ["a"]}, {"tags": [str(n) for n in range(33)]}, {"name": "x"},
    ],
)  # fmt: skip
def test_unusable_tags_are_refused(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest], body: dict[str, Any]
) -> None:
    answer = service.client.patch(f"/v1/artifacts/{versions[0].id}", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


def test_one_artifact_has_at_most_32_tags(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    where = f"/v1/artifacts/{versions[0].id}"
    assert service.client.patch(where, json={"tags": [f"t{n}" for n in range(32)]}).status_code == 200
    answer = service.client.patch(where, json={"add_tags": ["one-more"]})
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_tags")
    assert service.client.patch(where, json={"tags": [f"u{n}" for n in range(32)]}).status_code == 200


def test_what_has_a_tag_is_deleted_by_force_alone(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    old, _ = versions
    patched(service, old.id, tags=["production"])
    where = f"/v1/artifacts/{old.id}"
    refused = service.client.delete(where)
    assert (refused.status_code, refused.json()["code"]) == (409, "artifact_tagged")
    assert "force" in refused.json()["remedy"]
    assert service.client.get(where).status_code == 200
    assert service.client.delete(where, params={"force": "true"}).status_code == 204
    assert service.redis.hgetall("nibble:tags:default") == {}


def test_a_collection_leaves_what_has_a_tag(service: Service) -> None:
    job = service.submit()
    manifest = service.publish(job["id"], {"model.safetensors": b"weights"})
    patched(service, manifest.id, tags=["seen"])
    service.claim(job["id"])
    failed = {"state": JobState.FAILED}
    service.store.update(job["id"], lambda each: each.model_copy(update=failed), attempt=1)
    answer = service.client.post("/v1/gc", params={"dry_run": "true"}).json()
    assert answer["artifacts"] == []
    patched(service, manifest.id, tags=[])
    answer = service.client.post("/v1/gc", params={"dry_run": "true"}).json()
    assert answer["artifacts"] == [f"artifacts/{manifest.id}"]


def test_the_registry_lists_the_versions_of_each_model(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    old, new = versions
    patched(service, old.id, tags=["production"])
    (model,) = service.client.get("/v1/registry").json()["data"]
    assert (model["model"], model["tags"]) == (MODEL, {"production": old.id})
    assert [each["id"] for each in model["versions"]] == [new.id, old.id]
    assert service.client.get("/v1/registry", params={"model": "org/other"}).json()["data"] == []
    page = service.client.get("/v1/registry", params={"model": MODEL, "limit": 1}).json()
    assert (page["has_more"], page["next"]) == (True, new.id)
    answer = service.client.get("/v1/registry")
    unchanged = service.client.get("/v1/registry", headers={"If-None-Match": answer.headers["ETag"]})
    assert unchanged.status_code == 304
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as other:
        assert other.get("/v1/registry").json()["data"] == []
        assert other.patch(f"/v1/artifacts/{old.id}", json={"tags": ["x"]}).status_code == 404
    with service.client_with(service.key(Scope.ARTIFACTS_READ)) as reader:
        assert reader.patch(f"/v1/artifacts/{old.id}", json={"tags": ["x"]}).status_code == 403


def test_a_deployment_serves_what_a_tag_points_to(
    service: Service, versions: tuple[ArtifactManifest, ArtifactManifest]
) -> None:
    old, new = versions
    patched(service, old.id, tags=["production"])
    answer = service.client.post("/v1/deployments", json={"artifact": TAGGED, "name": "tiny"})
    assert (answer.status_code, answer.json()["artifact"]) == (202, old.id)
    patched(service, new.id, tags=["production"])
    read = service.client.get(answer.headers["Location"]).json()
    assert read["artifact"] == old.id, "a deployment does not move with the tag"
    gone = service.client.post("/v1/deployments", json={"artifact": f"{MODEL}@staging", "name": "other"})
    assert (gone.status_code, gone.json()["code"]) == (404, "tag_not_found")


def test_an_export_has_flat_names_that_trackers_take(service: Service) -> None:
    recipes = [{"method": "rtn"}, {"method": "rtn", "bits": 8}]
    job = service.submit(labels={"team": "search"}, recipe=recipes)
    figures = {
        "perplexity": 10.5, "perplexity_ratio_interval": {"low": 1.0, "high": 1.1}, "beyond_noise": True,
        "layers": [{"layer": 0}], "kl": float("nan"), "label": "x",
    }  # fmt: skip
    report = {
        "original": {"perplexity": 10.0}, "stages": {"searching": 2.5}, "peak_rss_bytes": 7,
        "candidates": [{"recipe_index": index, **figures} for index in (0, 1)], "peak_vram_bytes": None,
    }  # fmt: skip
    service.objects.put(f"reports/{job['id']}.json", json.dumps(report).encode())
    export = service.client.get(f"/v1/jobs/{job['id']}/export").json()
    assert export["metrics"] == {
        "original.perplexity": 10.0, "stage_seconds.searching": 2.5, "peak_rss_bytes": 7.0,
        "0.recipe_index": 0.0, "1.recipe_index": 1.0, "0.perplexity": 10.5, "1.perplexity": 10.5,
        "0.perplexity_ratio_interval.low": 1.0, "0.perplexity_ratio_interval.high": 1.1,
        "1.perplexity_ratio_interval.low": 1.0, "1.perplexity_ratio_interval.high": 1.1,
    }  # fmt: skip
    assert export["params"]["model"] == MODEL
    assert export["params"]["recipe.1.bits"] == "8"
    assert export["tags"] == {"nibble.job": job["id"], "nibble.state": "queued", "label.team": "search"}
    for name in (*export["params"], *export["metrics"], *export["tags"]):
        assert re.fullmatch(r"[\w\-. /]{1,250}", name), name
    assert all(isinstance(value, str) and len(value) <= 6000 for value in export["params"].values())
