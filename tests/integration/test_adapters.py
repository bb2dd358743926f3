"""LoRA adapters as part of a job's model: merged as peft merges them, and quantized like the merged model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.core.child.assignment import Checkpointed, ProgressMessage
from app.core.child.job_child import CHILD_MODULE
from app.core.errors import ModelRefused
from app.core.jobs.estimate import estimate
from app.core.jobs.submission import CheckedSubmission, check_submission
from app.core.records.job import JobState
from app.core.records.specs import JobSpec, Recipe
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from tests.adapters import DOWN, GOLDEN, factors, write_adapter
from tests.golden.make_adapters import BUNDLED, CASES, STEP, golden_model
from tests.integration.workshop import Workshop
from tests.quantized_sources import fp8_source
from tests.tiny_models import EngineRun, assignment, fitted_architecture, tiny_model, tiny_spec
from workers.attempts.attempt import run_attempt
from workers.child.job_run import run_job
from workers.child.streaming import run_model_free
from workers.modeling import checkpoint as checkpoints
from workers.modeling.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"
MERGED = "merged.safetensors"  # of golden adapters
SHAPE = (64, 128)  # of the tiny model's down_proj


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = factors(SHAPE) | factors((64, 64), "model.layers.1.self_attn.q_proj")
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one", tensors)


@pytest.fixture(scope="module")
def merged(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model as a folder of its own, by the formula."""
    folder = tmp_path_factory.mktemp("models") / "merged"
    shutil.copytree(model, folder)
    tensors, parts = load_file(model / WEIGHTS), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if "lora_A" in name]:
        own = name.removeprefix("base_model.model.").replace("lora_A.", "")
        tensors[own] += 2.0 * parts[name.replace("lora_A", "lora_B")] @ parts[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def changed_tensors(model: Path, adapter: Path) -> dict[str, Tensor]:
    source = Checkpoint.original(model, adapter)
    return {name: source.tensor(name) for name, header in source.tensors.items() if header.merged is not None}


@pytest.mark.parametrize("chunk_bytes", [checkpoints.CHUNK_BYTES, 100])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_merged_as_peft_merges_them(
    case: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within float32's rounding of sums of a few products: also where rows are read in pieces."""
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", chunk_bytes)
    golden_model(**CASES[case][0]).save_pretrained(tmp_path)
    own, peft = changed_tensors(tmp_path, GOLDEN / case), load_file(GOLDEN / case / MERGED)
    assert own.keys() == peft.keys()
    for name, value in peft.items():
        torch.testing.assert_close(own[name], value, rtol=2e-6, atol=2e-7, msg=name)


def test_the_bundled_model_is_merged_as_peft_merges_it() -> None:
    """In bfloat16 each weight is peft's in float32, rounded: half a unit of its last place."""
    own, peft = changed_tensors(BUNDLED, GOLDEN / "bundled"), load_file(GOLDEN / "bundled" / MERGED)
    assert own.keys() == peft.keys()
    before = load_file(BUNDLED / WEIGHTS)
    for name, value in peft.items():
        assert own[name].dtype == torch.bfloat16
        sample = own[name].flatten()[::STEP].float()
        torch.testing.assert_close(sample, value, rtol=2**-8, atol=1e-7, msg=name)
        assert not torch.allclose(sample, before[name].flatten()[::STEP].float(), rtol=2**-8)


def test_experts_that_files_hold_apart_are_merged_one_by_one(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = tiny_model(tmp_path / "model", "qwen3_moe", **experts)
    expert = "model.layers.1.mlp.experts.2.up_proj"
    parts = factors((32, 64), expert)
    source = Checkpoint.original(folder, write_adapter(tmp_path / "adapter", parts))
    architecture = fitted_architecture(source)
    source = source.with_experts(architecture.stored_layers, architecture.kinds)
    before = load_file(folder / WEIGHTS)[f"{expert}.weight"]
    expected = before + 2 * parts[f"{expert}.lora_B.weight"] @ parts[f"{expert}.lora_A.weight"]
    torch.testing.assert_close(source.tensor(f"{expert}.weight"), expected)


def test_a_model_that_was_quantized_before_is_merged_after_it_is_dequantized(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain", hidden_size=256, intermediate_size=384, dtype=torch.bfloat16)
    fp8 = fp8_source(plain, tmp_path / "fp8")
    parts = factors((256, 384))
    adapter = write_adapter(tmp_path / "adapter", parts)
    source, merged = Checkpoint.original(fp8, None), Checkpoint.original(fp8, adapter)
    update = 2 * parts[f"{DOWN}.lora_B.weight"] @ parts[f"{DOWN}.lora_A.weight"]
    expected = source.tensor(f"{DOWN}.weight").float() + update
    torch.testing.assert_close(merged.tensor(f"{DOWN}.weight").float(), expected, rtol=2**-8, atol=1e-6)
    assert merged.source == source.source


def test_broken_updates_are_told_from_broken_weights(model: Path, tmp_path: Path) -> None:
    parts = factors(SHAPE)
    parts[f"{DOWN}.lora_B.weight"][3, 0] = float("nan")
    source = Checkpoint.original(model, write_adapter(tmp_path / "adapter", parts))
    with pytest.raises(ModelRefused, match="with the adapter merged into it") as refusal:
        source.tensor(f"{DOWN}.weight")
    assert refusal.value.code == "weights_not_finite"


def same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def adapted(adapter: Path) -> dict[str, Any]:
    return {"adapter_folder": adapter, "adapter_name": "one", "adapter_digest": "a" * 64}


RECIPES = (Recipe(method="awq", group_size=32), Recipe(method="gptq", group_size=32))


def test_a_job_with_an_adapter_is_a_job_on_the_merged_model(
    model: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    """The same files, and the same figures of the original: by a run that is killed and resumed, too."""
    spec = tiny_spec(RECIPES)
    other = EngineRun(spec, merged, tmp_path / "other")
    own = EngineRun(spec, model, tmp_path / "own", **adapted(adapter))
    assert own.report.original == other.report.original
    assert own.report.original != EngineRun(tiny_spec(), model, tmp_path / "base").report.original
    assert (own.report.adapter, own.report.adapter_digest) == ("one", "a" * 64)
    for index in range(len(RECIPES)):
        same_files(*(run.folder("compressed-tensors", index) for run in (own, other)))

    class Killed(Exception):
        pass

    def die_after_a_layer(message: ProgressMessage) -> None:
        if isinstance(message, Checkpointed):
            raise Killed

    job = assignment(spec, model, tmp_path / "resumed", **adapted(adapter))
    job.work_folder.mkdir()
    with pytest.raises(Killed):
        run_job(job, die_after_a_layer)
    finished = run_job(job, lambda _: None)
    same_files(job.work_folder / finished.outputs[0].folder, other.folder("compressed-tensors"))


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4a16", "wna16"])
def test_a_job_without_an_evaluation_is_one_on_the_merged_model(
    scheme: str, model: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    spec = JobSpec.model_validate(
        {"model": "any", "recipe": {"method": "rtn", "scheme": scheme}, "evaluation": None}
    )
    folders = []
    for name, folder, changes in (("own", model, adapted(adapter)), ("other", merged, {})):
        job = assignment(spec, folder, tmp_path / name, **changes)
        job.work_folder.mkdir()
        folders.append(job.work_folder / run_model_free(job, lambda _: None).outputs[0].folder)
    same_files(*folders)


def test_another_adapter_is_other_work(model: Path, adapter: Path, tmp_path: Path) -> None:
    """Nothing that was finished with one adapter, or none, is taken for a job with another."""
    spec = tiny_spec()
    jobs = [
        assignment(spec, model, tmp_path, **changes)
        for changes in ({}, adapted(adapter), {**adapted(adapter), "adapter_digest": "b" * 64})
    ]
    assert len({job.layers_identity(spec.recipes) for job in jobs}) == 3
    other = write_adapter(tmp_path / "other", factors(SHAPE, seed=1))
    settings = Settings(state_dir=tmp_path / "state", model_roots=(model.parent, adapter.parent, tmp_path))
    checked = [submitted(model, each, settings) for each in (None, adapter, other)]
    assert len({each.fingerprint for each in checked}) == 3
    assert submitted(model, adapter, settings).fingerprint == checked[1].fingerprint
    with ModelCache(tmp_path / "cache", settings) as cache:
        fetched = [
            cache.fetch(model.as_uri(), lambda _: None, each and each.as_uri())
            for each in (None, adapter, other)
        ]
    assert len({each.merged_digest for each in fetched}) == 3
    assert len({each.digest for each in fetched}) == 1
    assert fetched[0].merged_digest == fetched[0].digest


def submitted(model: Path, adapter: Path | None, settings: Settings) -> CheckedSubmission:
    spec = JobSpec(
        model=model.as_uri(), adapter=adapter and adapter.as_uri(), recipe=Recipe(group_size=32)
    )  # fmt: skip
    return check_submission(spec, settings)


def test_a_service_says_what_is_merged_and_refuses_what_is_not(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    settings = Settings(state_dir=tmp_path / "state", model_roots=(model.parent, adapter.parent))
    checked = submitted(model, adapter, settings)
    assert any("is merged into 2 matrices before all else" in note for note in estimate(checked, "cpu").notes)
    for reference, code in (
        ((tmp_path / "elsewhere").as_uri(), "model_path_forbidden"),
        ((adapter.parent / "none").as_uri(), "model_not_found"),
        ("ftp://there", "model_reference_invalid"),
    ):
        with pytest.raises(ModelRefused) as refusal:
            check_submission(JobSpec(model=model.as_uri(), adapter=reference), settings)
        assert (refusal.value.code, refusal.value.param) == (code, "adapter")
    inside = Settings(state_dir=tmp_path / "state", model_roots=(model.parent, tmp_path))
    with pytest.raises(ModelRefused) as refusal:
        check_submission(
            JobSpec(model=model.as_uri(), adapter=inside.object_store_url + "/artifacts/art_1"), inside
        )
    assert (refusal.value.code, refusal.value.param) == ("model_path_forbidden", "adapter")


def test_a_service_publishes_what_it_merged(
    redis: Redis, redis_url: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    """A real child; a second job on the same adapter takes the result, one on another adapter does not."""
    other = write_adapter(tmp_path / "other", factors(SHAPE, seed=1))
    roots = (model.parent, adapter.parent, tmp_path)
    workshop = Workshop(redis, redis_url, tmp_path / "state", model_roots=roots)
    context = replace(workshop.context(), child_module=CHILD_MODULE)
    spec = tiny_spec(Recipe(method="rtn", group_size=32), model=model.as_uri(), adapter=adapter.as_uri())
    done = []
    for each in (spec, spec, spec.model_copy(update={"adapter": other.as_uri()})):
        job = workshop.record(each)
        run_attempt(context, job.id, 1)
        done.append(workshop.store.load(job.id))
    assert [job.state for job in done] == [JobState.SUCCEEDED] * 3, done[0].error
    first = workshop.manifest(done[0])
    assert first is not None
    assert (first.adapter, first.model) == (adapter.as_uri(), model.as_uri())
    assert first.adapter_digest is not None
    assert first.model_digest != first.adapter_digest
    assert done[1].artifacts == done[0].artifacts
    third = workshop.manifest(done[2])
    assert third is not None
    assert third.adapter_digest != first.adapter_digest
    assert third.model_digest == first.model_digest
    assert {file.path: file.sha256 for file in third.files} != {
        file.path: file.sha256 for file in first.files
    }


def test_the_terminal_merges_an_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "app.cli", "quantize", str(model), "--adapter", str(adapter), "--method", "rtn",
        "--group-size", "32", "--no-evaluation", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["adapter"] == adapter.as_uri()
    assert any("is merged into 2 matrices" in note for note in report["notes"])
    command[command.index(str(adapter))] = str(tmp_path / "none")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "save_pretrained" in refused.stderr
