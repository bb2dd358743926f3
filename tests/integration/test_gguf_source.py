"""A GGUF file as the model of a job: read as transformers reads it, quantized, opened by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.core.errors import ModelRefused
from app.core.jobs.estimate import estimate
from app.core.jobs.submission import check_submission
from app.core.records.specs import JobSpec, Recipe
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from tests.tiny_gguf import FILE, read_by_transformers, write_gguf
from tests.tiny_models import TOKENIZER, EngineRun, random_model, tiny_spec
from workers.child.job_run import run_job
from workers.modeling import checkpoint as checkpoints
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.gguf_tensors import write_tokenizer

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, Q4_1."""
    return write_gguf(random_model("llama"), tmp_path_factory.mktemp("tiny"), tied=True)


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    return EngineRun(tiny_spec(Recipe(group_size=32)), tiny, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_tensor_is_as_transformers_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Rotary rows in their places, whatever the size of the chunks in which the file is decoded."""
    folder = write_gguf(random_model("llama"), tmp_path, kind)
    own, other = Checkpoint(folder), read_by_transformers(folder)
    assert own.tensors.keys() == other.keys()
    dtypes = {Kind.BF16: torch.bfloat16, Kind.F32: torch.float32}
    for name, value in other.items():
        dtype = dtypes.get(kind, torch.float16) if value.dim() > 1 else torch.float32
        for chunk_bytes in (64, 4096, 2**24):
            monkeypatch.setattr(checkpoints, "CHUNK_BYTES", chunk_bytes)
            tensor = own.tensor(name)
            assert tensor.dtype == dtype
            assert torch.equal(tensor, value.to(dtype)), name
            assert b"".join(own.raw_bytes(name)) == tensor.view(torch.uint8).numpy().tobytes()
    assert own.source.format == "gguf"
    assert own.source.types[kind.name] >= 15


# transformers reads no qwen3 with other heads.
@pytest.mark.parametrize(("model_type", "head_size"), [("qwen2", 16), ("qwen3", 128)])
def test_other_families_are_as_transformers_reads_them(
    tmp_path: Path, model_type: str, head_size: int
) -> None:
    """With biases, with norms of heads; the config gives the same model, too."""
    model = random_model(model_type, head_dim=head_size)
    folder = write_gguf(model, tmp_path, Kind.F32)
    own, state = Checkpoint(folder), model.state_dict()
    assert own.tensors.keys() == state.keys()
    assert all(torch.equal(own.tensor(name), value) for name, value in state.items())
    for name, value in read_by_transformers(folder).items():
        assert torch.equal(own.tensor(name), value), name
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps"):
        if key != "head_dim" or model_type == "qwen3":
            assert own.config[key] == getattr(model.config, key)
    assert own.config["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_the_artifact_is_a_model_that_transformers_opens(run: EngineRun) -> None:
    folder = run.folder("compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # not a dict
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.float16
    windows = run.texts().evaluation.tokens
    with torch.inference_mode():
        losses = [model(row[None], labels=row[None]).loss.double() for row in windows]
    (candidate,) = run.report.candidates
    assert torch.stack(losses).mean().exp().item() == pytest.approx(candidate.perplexity, rel=2e-3)


def test_the_tokenizer_is_the_one_that_the_file_was_made_of(run: EngineRun) -> None:
    own, original = (AutoTokenizer.from_pretrained(f) for f in (run.folder("compressed-tensors"), TOKENIZER))
    for text in ("The king said: 'tis 1984!\n\n  And so  on.", "<|im_start|>user\nnaïve café<|im_end|>"):
        assert own(text)["input_ids"] == original(text)["input_ids"]
    assert own.chat_template == original.chat_template
    assert (own.bos_token, own.eos_token) == (original.bos_token, original.eos_token)


def test_the_report_and_the_events_name_the_source(run: EngineRun) -> None:
    assert run.report.source is not None
    assert run.report.source.format == "gguf"
    assert run.report.source.types == {"Q4_1": 15, "F32": 5}


def test_a_service_tells_the_source_in_estimate_and_job(tiny: Path, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state", model_roots=(tiny.parent,))
    checked = check_submission(JobSpec(model=tiny.as_uri(), recipe=Recipe(group_size=32)), settings)
    note = next(note for note in estimate(checked, "cpu").notes if "GGUF" in note)
    assert f"read from {FILE}" in note
    assert "15 of Q4_1" in note
    assert checked.download_bytes == 0  # it is read in place
    with ModelCache(tmp_path / "cache", settings) as cache:
        assert note in cache.fetch(tiny.as_uri(), lambda _: None).notes


def test_a_resumed_run_writes_the_same_bytes(run: EngineRun, tiny: Path, tmp_path: Path) -> None:
    from app.core.child.assignment import Checkpointed
    from tests.tiny_models import assignment

    class Killed(Exception):
        pass

    def die_after_a_layer(message: object) -> None:
        if isinstance(message, Checkpointed):
            raise Killed

    job = assignment(tiny_spec(Recipe(group_size=32)), tiny, tmp_path / "work")
    job.work_folder.mkdir()
    with pytest.raises(Killed):
        run_job(job, die_after_a_layer)
    finished = run_job(job, lambda _: None)
    report = json.loads((job.work_folder / finished.report).read_text())
    assert report["resumed_at_layer"] >= 1
    again, first = job.work_folder / finished.outputs[0].folder, run.folder("compressed-tensors")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def test_a_tokenizer_beside_the_file_goes_before_its_own(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "config.json").write_text("{}")
    marked = json.loads((TOKENIZER / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(marked))
    shutil.copyfile(TOKENIZER / "tokenizer_config.json", folder / "tokenizer_config.json")
    own = Checkpoint(folder)
    assert own.side_files == ("tokenizer.json", "tokenizer_config.json")
    assert own.config["model_type"] == "llama"
    run = EngineRun(tiny_spec(Recipe(group_size=32, method="rtn")), folder, tmp_path / "work")
    assert json.loads((run.folder("compressed-tensors") / "tokenizer.json").read_text()) == marked


def test_a_tokenizer_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    folder = write_gguf(random_model("llama"), tmp_path, tokenizer__ggml__other="x")
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content.replace(b"gpt-2", b"gpt-9"))
    with pytest.raises(ModelRefused, match="'gpt-9', which is not known here") as refusal:
        write_tokenizer(folder / FILE, tmp_path / "out")
    assert "tokenizer.json" in refusal.value.remedy


@pytest.mark.parametrize(
    ("names", "words", "remedy"),
    [
        (("a.gguf", "b.gguf"), "2 GGUF files: a.gguf, b.gguf", "with one"),
        (("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"), "one model in 2 GGUF files", "--merge"),
        (("a-00001-of-00002.gguf",), "one of several files of a model", "--merge"),
    ],
)
def test_several_files_are_refused(tmp_path: Path, names: tuple[str, ...], words: str, remedy: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    settings = Settings(state_dir=tmp_path / "state", model_roots=(tmp_path,))
    with pytest.raises(ModelRefused, match=words) as refusal:
        check_submission(JobSpec(model=tmp_path.as_uri()), settings)
    assert refusal.value.code == "gguf_several"
    assert remedy in refusal.value.remedy


def test_safetensors_go_before_gguf(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(TOKENIZER, tmp_path / "model")
    shutil.copyfile(tiny / FILE, folder / FILE)
    own = Checkpoint(folder)
    assert (own.source.format, own.gguf) == ("safetensors", None)
