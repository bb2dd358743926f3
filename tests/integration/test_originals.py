"""Deployments of originals: the model that an artifact was made of, unquantized, as the baseline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.core.formats.registry import FormatName
from app.core.records.artifact import ArtifactManifest
from app.core.sources.fetching import ModelCache
from app.core.storage.artifact_store import file_key
from app.core.storage.storage_keys import manifest_key
from tests.adapters import factors, write_adapter
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, Service
from tests.integration.hub_server import HubServer, hub_server
from tests.integration.serving_floor import Floor
from tests.integration.test_deployment_commands import nibble
from tests.tiny_gguf import write_gguf
from tests.tiny_models import random_model, tiny_model
from tests.waiting import wait_until

TOKEN = "hf_tokenofthejob"
QUESTION = [{"role": "user", "content": "The history of the city"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "messages": QUESTION}


@pytest.fixture
def floor(service: Service) -> Floor:
    return Floor(service)


def artifact_of(
    service: Service,
    model: str,
    files: dict[str, bytes] | None = None,
    *,
    format_name: FormatName = "compressed-tensors",
    **body: Any,
) -> ArtifactManifest:
    """The artifact of a job on the model, with the digests of what the job has read."""
    job = service.submit(model=model, **body)
    manifest = service.publish(job["id"], files or {"a.bin": b"x"}, format_name=format_name)
    token = SecretStr(body["hub_token"]) if "hub_token" in body else None
    settings = service.settings.acting_with(token)
    with ModelCache(settings.model_cache_dir, settings) as cache:
        read = cache.fetch(manifest.model, lambda _: None, body.get("adapter"))
    adapter = (
        {} if read.adapter is None else {"adapter": body["adapter"], "adapter_digest": read.adapter.digest}
    )
    manifest = manifest.model_copy(update={"model_digest": read.digest, **adapter})
    service.objects.put(manifest_key(manifest.id), manifest.model_dump_json().encode())
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def by_transformers(folder: Path) -> str:
    """The greedy answer of the model in a folder, as another program gives it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=GREEDY["max_tokens"], do_sample=False)
    said: str = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return said


def said_by(floor: Floor, name: str) -> str:
    content: str = floor.chat(name, **GREEDY).json()["choices"][0]["message"]["content"]
    return content


def test_an_original_answers_as_the_source_does_and_makes_way_for_its_artifact(
    service: Service, tmp_path: Path, small_artifact: Path
) -> None:
    floor = Floor(service)
    source = tiny_model(tmp_path / "source")
    manifest = artifact_of(service, source.as_uri(), contents(small_artifact))
    options = {"engine": "transformers", "dtype": "float32", "cache_share": 0.05, "max_model_len": 128}
    with floor.worker(real=True):
        deployment_id = floor.deploy("base", manifest.id, original=True, aliases=["b"], **options)
        wait_until(lambda: floor.view(deployment_id)["state"] == "ready", 120)
        assert floor.view(deployment_id)["original"] is True
        assert said_by(floor, "base") == by_transformers(source)
        card, alias = (floor.client.get(f"/v1/models/{name}").json() for name in ("base", "b"))
        assert (card["root"], card["parent"], card["quantization"]) == (source.as_uri(), None, None)
        assert alias["parent"] == "base"
        assert not (service.settings.state_dir / "cache" / "artifacts" / manifest.id).exists()
        # What it is read from is named by the artifact alone, which therefore stays.
        in_use = floor.client.delete(f"/v1/artifacts/{manifest.id}")
        assert (in_use.status_code, in_use.json()["code"]) == (409, "artifact_in_use")
        floor.client.patch(f"/v1/deployments/{deployment_id}", json={"original": False}).raise_for_status()
        wait_until(lambda: floor.view(deployment_id)["generation"] == 2, 120)
        assert floor.view(deployment_id)["original"] is False
        card = floor.client.get("/v1/models/base").json()
        assert (card["root"], card["parent"]) == (manifest.id, source.as_uri())
        assert card["quantization"]["format"] == "compressed-tensors"


def test_an_idle_original_rests_and_starts_again_at_the_next_request(
    service: Service, tmp_path: Path
) -> None:
    """With stand-in servers. Its artifact is one that is not served; its source is what the job has read."""
    floor = Floor(service)
    source = tiny_model(tmp_path / "source")
    manifest = artifact_of(service, source.as_uri(), format_name="gguf")
    with floor.worker():
        deployment_id = floor.ready("base", artifact=manifest.id, original=True, idle_timeout_s=1)
        floor.await_state(deployment_id, "stopped")
        (source / "generation_config.json").write_text(json.dumps({"temperature": 0.1}))
        assert floor.chat("base").status_code == 503
        view = floor.await_state(deployment_id, "failed")
        assert view["error"]["code"] == "original_changed"
        assert "quantize the model as it is now" in view["error"]["remedy"]


@pytest.mark.parametrize("has_adapter", [False, True], ids=["source", "merged"])
def test_an_idle_original_serves_again(service: Service, tmp_path: Path, has_adapter: bool) -> None:
    """With stand-in servers, each over the folder that it was started with."""
    floor = Floor(service)
    body = with_adapter(tmp_path) if has_adapter else {"model": tiny_model(tmp_path / "source").as_uri()}
    manifest = artifact_of(service, **body)
    with floor.worker():
        deployment_id = floor.ready("base", artifact=manifest.id, original=True, idle_timeout_s=1)
        pids = floor.server_pids(deployment_id)
        view = floor.await_state(deployment_id, "stopped")
        assert (view["original"], view["servers"]) == (True, [])
        assert not floor.server_pids(deployment_id)
        refused = floor.chat("base")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        wait_until(lambda: floor.chat("base").status_code == 200, 30)
        assert pids
        assert not set(pids) & set(floor.server_pids(deployment_id))


Change = Callable[[Service, Path, ArtifactManifest], None]


def nothing(service: Service, source: Path, manifest: ArtifactManifest) -> None:
    """Nothing happens between the job and the deployment."""


def folder_removed(service: Service, source: Path, manifest: ArtifactManifest) -> None:
    shutil.rmtree(source)


def in_own_storage(service: Service, source: Path, manifest: ArtifactManifest) -> None:
    stored = service.settings.state_dir / "storage" / file_key(manifest, "a.bin")
    record = manifest.model_copy(update={"model": stored.parent.as_uri()})
    service.objects.put(manifest_key(manifest.id), record.model_dump_json().encode())


def of_a_family_that_is_not_served(service: Service, source: Path, manifest: ArtifactManifest) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "diffllama"}))


@pytest.mark.parametrize(
    ("happens", "fields", "code", "param", "remedy"),
    [
        (folder_removed, {}, "model_not_found", "original", "put the model back at file://"),
        (folder_removed, {}, "model_not_found", "original", "with `force` on a copy that is there"),
        (in_own_storage, {}, "model_path_forbidden", "original", "name a model"),
        (of_a_family_that_is_not_served, {"engine": "transformers"}, "model_not_served", "engine", "vllm"),
        (nothing, {"max_model_len": 5000, "engine": "transformers"}, "max_model_len_too_large",
         "max_model_len", "at most 256"),
    ],
)  # fmt: skip
def test_what_can_not_be_served_is_refused_at_once(
    service: Service,
    tmp_path: Path,
    happens: Change,
    fields: dict[str, Any],
    code: str,
    param: str,
    remedy: str,
) -> None:
    source = tiny_model(tmp_path / "source")
    manifest = artifact_of(service, source.as_uri())
    happens(service, source, manifest)
    body = {"name": "base", "artifact": manifest.id, "original": True, **fields}
    answer = service.client.post("/v1/deployments", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert answer.json()["param"] == param
    assert remedy in answer.json()["remedy"]
    if param == "original":
        assert manifest.id in answer.json()["detail"]


def test_the_terminal_serves_an_original_and_replaces_it(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NIBBLE_URL", service.url)
    monkeypatch.setenv("NIBBLE_API_KEY", ADMIN_KEY)
    manifest = artifact_of(service, tiny_model(tmp_path / "source").as_uri())
    said = f"original of {manifest.id}"
    with Floor(service).worker():
        assert nibble("deploy", manifest.id, "--name", "base", "--original") == 0
        assert said in capsys.readouterr().out
        assert nibble("deployments") == 0
        assert said in capsys.readouterr().out
        assert nibble("deployments", "replace", "base", manifest.id) == 0
        shown = capsys.readouterr().out
    assert manifest.id in shown
    assert said not in shown.partition("base")[2].splitlines()[0]


def gguf(folder: Path) -> dict[str, Any]:
    return {"model": write_gguf(random_model("llama"), folder / "gguf").as_uri()}


def with_adapter(folder: Path) -> dict[str, Any]:
    adapter = write_adapter(folder / "adapter", factors((64, 128)))
    return {"model": tiny_model(folder / "source").as_uri(), "adapter": adapter.as_uri()}


@pytest.mark.parametrize(
    ("source", "words"), [(gguf, "is a GGUF file"), (with_adapter, "an adapter is merged")]
)
def test_what_vllm_does_not_read_is_served_by_our_own_server(
    service: Service, tmp_path: Path, source: Callable[[Path], dict[str, Any]], words: str
) -> None:
    body = source(tmp_path)
    manifest = artifact_of(service, body.pop("model"), **body, recipe={"group_size": 32})
    asked = {"name": "base", "artifact": manifest.id, "original": True, "engine": "vllm"}
    refused = service.client.post("/v1/deployments", json=asked)
    assert (refused.status_code, refused.json()["code"]) == (422, "original_needs_transformers")
    assert words in refused.json()["detail"]
    floor = Floor(service)
    deployment_id = floor.deploy("base", manifest.id, original=True)
    card = floor.client.get("/v1/models/base").json()
    adapter = body.get("adapter")
    assert (card["root"], card["parent"]) == (
        (adapter, manifest.model) if adapter else (manifest.model, None)
    )
    with floor.worker():
        assert floor.await_state(deployment_id, "ready")["servers"][0]["engine"] == "transformers"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    bundled = EXAMPLES / "wikitext-llama-6m"
    with hub_server() as server:
        server.token = TOKEN
        server.push("org/gated", {path.name: path.read_bytes() for path in bundled.iterdir()})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_a_token_of_the_job_does_not_outlive_it(service: Service, hub: HubServer) -> None:
    """Although its files are in the cache: what may no longer be read is not served."""
    manifest = artifact_of(service, "hf:org/gated", hub_token=TOKEN)
    assert manifest.model.startswith("hf:org/gated@")
    body = {"name": "base", "artifact": manifest.id, "original": True}
    refused = service.client.post("/v1/deployments", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "model_not_found")
    assert "let the operator set HF_TOKEN" in refused.json()["remedy"]
    assert TOKEN not in refused.text
    hub.token = None
    assert service.client.post("/v1/deployments", json=body).status_code == 202
