"""Jobs without an evaluation: any checkpoint, tensor by tensor, with the numbers of the evaluated path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.core.child.assignment import CHECKPOINTS, Checkpointed, Finished, ProgressMessage
from app.core.child.job_child import JobChild
from app.core.errors import ModelRefused, RecipeUnsupported, VerificationFailed
from app.core.jobs.report import Report
from app.core.records.job import JobState
from app.core.records.specs import JobSpec, Recipe
from app.core.storage.storage_keys import report_key
from tests.integration.workshop import Workshop
from tests.tiny_models import EngineRun, assignment, random_model, save_model, tiny_spec
from tests.waiting import wait_until
from workers.child.streaming import run_model_free
from workers.formats.streamed_folder import StreamedFile

SCHEMES = ("wna16", "w4a8", "w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4", "mxfp4a16")


def spec_of(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"model": "any", "recipe": {"method": "rtn"}, "evaluation": None, **changes}
    )


class StreamedRun:
    """A run of `run_model_free`, with what it left."""

    def __init__(self, spec: JobSpec, model: Path, work: Path, **changes: object) -> None:
        self.messages: list[ProgressMessage] = []
        self.work = work
        work.mkdir(exist_ok=True)
        job = assignment(spec, model, work, **changes)
        self.finished: Finished = run_model_free(job, self.messages.append)

    @property
    def report(self) -> Report:
        return Report.model_validate_json((self.work / self.finished.report).read_text())

    @property
    def folder(self) -> Path:
        return self.work / self.finished.outputs[0].folder

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.folder)

    @property
    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        return entry


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of several slices, and rows that are no multiple of a block."""
    model = random_model(
        "llama", torch.bfloat16, hidden_size=256, intermediate_size=640, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    return save_model(model, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type that nobody has: two stacks, a router, an embedding, fused experts, a tower."""
    folder = tmp_path_factory.mktemp("models") / "unknown"
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(torch.bfloat16)

    tensors = {"token_embedding.weight": random(256, 64), "head.weight": random(256, 64)}
    for layer in range(3):  # the last is a draft: the config has two
        prefix = f"blocks.{layer}."
        tensors |= {
            prefix + "attention.q_proj.weight": random(160, 64),
            prefix + "attention.k_proj.weight": random(32, 64),
            prefix + "attention.v_proj.weight": random(32, 64),
            prefix + "attention.q_proj.bias": random(160),
            prefix + "mixing.router.weight": random(32, 64),
            prefix + "mixing.scores.weight": random(4, 64),
            prefix + "mixing.experts.gate_up_proj": random(4, 64, 64),
            prefix + "norm.weight": random(64),
        }
    tensors["vision_tower.blocks.0.fc.weight"] = random(64, 64)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "nobody_has_this", "architectures": ["NobodyModel"], "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_are_those_of_an_evaluated_job(tmp_path: Path, llama: Path, scheme: str) -> None:
    recipe = {"method": "rtn", "scheme": scheme}
    judged = EngineRun(tiny_spec(Recipe.model_validate(recipe)), llama, tmp_path / "judged")
    streamed = StreamedRun(spec_of(recipe=recipe), llama, tmp_path / "streamed")
    assert same(streamed.tensors, tensors_of(judged.folder("compressed-tensors")))
    config = (judged.folder("compressed-tensors") / "config.json").read_text()
    assert (streamed.folder / "config.json").read_text() == config


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_other_formats_hold_the_same_too(tmp_path: Path, llama: Path, name: str) -> None:
    recipe = {"method": "rtn", "group_size": 64, "symmetric": name == "gptq"}
    judged = EngineRun(tiny_spec(Recipe.model_validate(recipe), formats=(name,)), llama, tmp_path / "judged")
    streamed = StreamedRun(spec_of(recipe=recipe, formats=[name]), llama, tmp_path / "streamed")
    assert same(streamed.tensors, tensors_of(judged.folder(name)))


def test_a_type_that_nobody_knows_is_quantized_by_names(tmp_path: Path, unknown: Path) -> None:
    run = StreamedRun(spec_of(recipe={"method": "rtn", "scheme": "fp8"}), unknown, tmp_path / "work")
    before, tensors = load_file(unknown / "model.safetensors"), run.tensors
    rounded = {name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    assert rounded == {
        f"blocks.{layer}.attention.{name}.weight"
        for layer in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    for name in rounded:
        values = tensors[name].float() * tensors[f"{name}_scale"].float()
        assert (values - before[name].float()).norm() / before[name].float().norm() < 0.03
    assert all(torch.equal(tensors[name], before[name]) for name in before.keys() - rounded)
    ignored = run.entry["ignore"]
    assert {"blocks.0.mixing.router", "blocks.2.attention.qkv_proj", "head"} <= set(ignored)
    assert any("vision_tower" in each for each in ignored)
    assert not any(name.removesuffix(".weight") in ignored for name in rounded)
    notes = " ".join(run.report.notes)
    assert "6 linears are chosen by their names" in notes
    assert "3 tensors of fused experts keep their precision" in notes


def test_the_report_says_that_nothing_was_judged(tmp_path: Path, unknown: Path) -> None:
    report = StreamedRun(
        spec_of(recipe={"method": "rtn", "scheme": "fp8"}), unknown, tmp_path / "work"
    ).report
    (candidate,) = report.candidates
    assert report.evaluation is None
    assert report.calibration is None
    assert report.original.perplexity is None
    assert (candidate.perplexity, candidate.perplexity_ratio, candidate.kl) == (None, None, None)
    assert len(candidate.linears) == 6
    assert all(0 < (linear.weight_error or 0) < 0.03 for linear in candidate.linears)
    assert any("nothing is known of the model's quality" in note for note in report.notes)


def test_fused_linears_share_one_divisor(tmp_path: Path, unknown: Path) -> None:
    tensors = StreamedRun(
        spec_of(recipe={"method": "rtn", "scheme": "nvfp4a16"}), unknown, tmp_path / "work"
    ).tensors
    divisors = [
        float(tensors[f"blocks.{layer}.attention.{name}_proj.weight_global_scale"])
        for layer in (0, 1)
        for name in "qkv"
    ]
    assert len(set(divisors[:3])) == len(set(divisors[3:])) == 1
    assert divisors[0] != divisors[3]


def test_a_broken_weight_is_refused(tmp_path: Path, unknown: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(unknown, broken)
    tensors = load_file(unknown / "model.safetensors")
    tensors["blocks.1.attention.q_proj.weight"][130, 5] = torch.inf
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ModelRefused, match=r"blocks\.1\.attention\.q_proj"):
        StreamedRun(spec_of(recipe={"method": "rtn", "scheme": "fp8"}), broken, tmp_path / "work")


def test_a_split_of_what_servers_fuse_is_refused(tmp_path: Path, unknown: Path) -> None:
    recipe = {"method": "rtn", "scheme": "fp8", "ignore": ["k_proj"]}
    with pytest.raises(RecipeUnsupported, match="servers fuse them"):
        StreamedRun(spec_of(recipe=recipe), unknown, tmp_path / "work")


def test_transposed_matrices_are_refused(tmp_path: Path) -> None:
    folder = save_model(random_model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(ModelRefused, match="stored transposed"):
        StreamedRun(spec_of(), folder, tmp_path / "work")


def test_a_disk_that_gives_back_other_bytes_is_noticed(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StreamedFile.check

    def after_a_flip(file: StreamedFile, stretch: Any) -> None:
        os.pwrite(file.descriptor, b"\x55\xaa", file.size - 2)
        original(file, stretch)

    monkeypatch.setattr(StreamedFile, "check", after_a_flip)
    with pytest.raises(VerificationFailed, match="read back"):
        StreamedRun(spec_of(recipe={"method": "rtn", "scheme": "fp8"}), llama, tmp_path / "work")


class Killed(BaseException):
    """In place of signal 9: nothing after it runs."""


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4a16"])
def test_a_run_goes_on_after_the_files_that_are_finished(tmp_path: Path, llama: Path, scheme: str) -> None:
    spec = spec_of(recipe={"method": "rtn", "scheme": scheme})
    whole = StreamedRun(spec, llama, tmp_path / "whole", shard_bytes=400_000)
    keys = [message.key for message in whole.messages if isinstance(message, Checkpointed)]
    files = [key for key in keys if not key.endswith(".json")]
    assert len(files) > 3
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / CHECKPOINTS).mkdir()

    def dies(message: ProgressMessage) -> None:
        if isinstance(message, Checkpointed) and message.key == files[1]:
            raise Killed

    with pytest.raises(Killed):
        run_model_free(assignment(spec, llama, broken, shard_bytes=400_000), dies)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(broken / CHECKPOINTS, again / CHECKPOINTS)
    (again / CHECKPOINTS / files[0]).write_bytes((again / CHECKPOINTS / files[0]).read_bytes()[:-7])
    resumed = StreamedRun(spec, llama, again, shard_bytes=400_000)
    announced = [message.key for message in resumed.messages if isinstance(message, Checkpointed)]
    assert files[0] in announced  # it was cut short
    assert files[1] not in announced
    assert resumed.report.environment["restored_files"] == 1
    for file in whole.folder.iterdir():
        assert (resumed.folder / file.name).read_bytes() == file.read_bytes()
    assert resumed.report.candidates[0].linears == whole.report.candidates[0].linears


def test_the_service_publishes_what_nothing_was_judged_of(
    redis: Redis, redis_url: str, tmp_path: Path, unknown: Path
) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state", model_roots=(unknown.parent,))
    spec = spec_of(model=unknown.as_uri(), recipe={"method": "rtn", "scheme": "fp8", "group_size": -1})
    job = workshop.record(spec)
    with workshop.worker("first", "-m", "workers.main", "--device", "cpu", "--name", "first"):
        assert workshop.queue.enqueue(job)
        wait_until(lambda: workshop.store.load(job.id).is_terminal, limit_s=120)
    ended = workshop.store.load(job.id)
    assert ended.state is JobState.SUCCEEDED, ended.error
    manifest = workshop.manifest(ended, "compressed-tensors")
    assert manifest is not None
    assert manifest.summary.keys() == {"label", "bits_per_weight", "bytes"}
    report = Report.model_validate_json(workshop.objects.get(report_key(job.id)))
    assert report.candidates[0].perplexity is None
    assert "checkpoint" in workshop.kinds(job)


def test_the_path_loads_no_transformers() -> None:
    """It takes as long to load as PyTorch, which is a third of a small job."""
    code = "import sys, workers.child.__main__, workers.child.streaming; print('transformers' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert child.stdout.strip() == "False"


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A gigabyte of weights, one matrix of which has a quarter; without transformers in the process."""
    model, work = tmp_path / "large", tmp_path / "work"
    model.mkdir()
    work.mkdir()
    stock = torch.randn(16384, 2048).to(torch.bfloat16)
    for number in range(8):
        tensors = {f"layers.{number}.fc.weight": stock if number else torch.cat([stock] * 4)}
        save_file(tensors, model / f"model-{number}.safetensors")
    (model / "config.json").write_text('{"model_type": "nobody_has_this", "num_hidden_layers": 8}')
    job = assignment(spec_of(recipe={"method": "rtn", "scheme": "fp8"}), model, work)
    with JobChild(job) as child:
        last = list(child.messages())[-1]
    assert isinstance(last, Finished), last
    report = Report.model_validate_json((work / last.report).read_text())
    assert sum(file.stat().st_size for file in model.glob("*.safetensors")) > 7e8
    assert report.peak_rss_bytes < 6e8
