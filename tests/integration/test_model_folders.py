"""Model folders as they come: files beside the model and tensors beyond it, against every consequence."""

from __future__ import annotations

import codecs
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.core.child.assignment import Noted
from app.core.errors import ModelRefused
from app.core.jobs.submission import check_submission
from app.core.records.specs import Recipe
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.sources.file_choice import INDEX, SINGLE
from tests.inference import Served, greedy
from tests.tiny_models import DEEPSEEK, EngineRun, assignment, random_model, save_model, tiny_model, tiny_spec
from workers.child.job_run import run_job
from workers.texts.windows import load_tokenizer

RECIPE = Recipe(method="rtn", group_size=32, symmetric=True)
PROMPT = [5, 6, 7]
Edit = Callable[[Path], object]


def noise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in tensors.items()}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"layers.wq.{number}": value for number, value in enumerate(noise(tensors).values())}


def second(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = noise) -> Edit:
    """A further file of weights."""
    return lambda folder: save_file(change(load_file(folder / SINGLE)), folder / name)


def beside(*names: str) -> Edit:
    """Files that end the process if they are run, and break readers that take them for something else."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("raise SystemExit('never run')\n")

    return write


def shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards and their index."""
    files = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in range(2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def stale_single(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    shards(folder, tensors)
    save_file(noise(tensors), folder / SINGLE)


def stale_index(folder: Path) -> None:
    shards(folder, load_file(folder / SINGLE))
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()


def edit_json(name: str, **changes: object) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def with_code(folder: Path) -> None:
    """As publishers ship families that have come into transformers since."""
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json("config.json", auto_map=names)(folder)
    edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})(folder)
    beside("modeling_x.py", "configuration_x.py", "tokenization_x.py")(folder)


def with_marks(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())


# What is beside the model; what a note names; whether the digest stays.
BESIDE: dict[str, tuple[Edit, str, bool]] = {
    "a second file of weights": (second("model_old.safetensors"), "model_old.safetensors", True),
    "weights in another layout": (
        second("consolidated.safetensors", renamed), "consolidated.safetensors", True,
    ),
    "an adapter": (second("adapter_model.safetensors", renamed), "adapter_model.safetensors", True),
    "an adapter's settings": (beside("adapter_config.json"), "adapter_config.json", True),
    "pickles": (beside("pytorch_model.bin", "original/x.00.pth"), "original/x.00.pth", True),
    "programs": (beside("handler.py", "modeling_x.py", "original/x.py"), "handler.py", True),
    "settings of other tools": (beside("quantize_config.json", "params.json"), "params.json", True),
    "another chat template": (beside("old.jinja"), "old.jinja", True),
    "a stale single file": (stale_single, "as for vLLM", False),
    "a stale index": (stale_index, "none of the files that", True),
    "names of code": (with_code, "auto_map in config.json", False),
    "byte-order marks": (with_marks, "", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the plain folder."""
    return artifact_of(plain, tmp_path_factory.mktemp("made"))


def run_on(model: Path, work: Path, **changes: object) -> EngineRun:
    return EngineRun(tiny_spec(RECIPE, formats=("compressed-tensors",)), model, work / "work", **changes)


def artifact_of(model: Path, work: Path) -> Path:
    return run_on(model, work).folder("compressed-tensors")


def answer(artifact: Path) -> list[int]:
    return Served(artifact, dtype=torch.float32).generate([greedy(PROMPT, 6)])[0]


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(("edit", "noted", "same_digest"), BESIDE.values(), ids=list(BESIDE))
def test_what_lies_beside_a_model_changes_nothing(
    plain: Path, made: Path, tmp_path: Path, edit: Edit, noted: str, same_digest: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    edit(model)
    settings = Settings(model_roots=(plain.parent, tmp_path))

    def checked(folder: Path) -> tuple[int, int, tuple[str, ...]]:
        plan = check_submission(tiny_spec(RECIPE, model=folder.as_uri()), settings).plan
        return plan.parameters, plan.model_bytes, plan.notes

    parameters, size, notes = checked(model)
    assert (parameters, size) == checked(plain)[:2]
    assert [note for note in notes if noted in note] or not noted
    cache = ModelCache(tmp_path / "cache", settings)
    fetched = cache.fetch(model.as_uri(), lambda _: None)
    assert set(fetched.notes) <= set(notes)
    assert (fetched.digest == cache.fetch(plain.as_uri(), lambda _: None).digest) is same_digest

    artifact = artifact_of(model, tmp_path)
    written, expected = (load_file(folder / SINGLE) for folder in (artifact, made))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert [path.name for path in artifact.glob("*.safetensors")] == [SINGLE]
    side, plain_side = files_of(artifact), files_of(made)
    assert side.keys() == plain_side.keys()
    for name, content in side.items():
        assert (
            json.loads(content) == json.loads(plain_side[name])
            if name.endswith(".json")
            else (content == plain_side[name])
        ), name
    assert answer(artifact) == answer(made)


def test_further_chat_templates_are_kept(plain: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    settings = Settings(model_roots=(tmp_path, plain.parent))
    cache = ModelCache(tmp_path / "cache", settings)
    digests = {cache.fetch(folder.as_uri(), lambda _: None).digest for folder in (model, plain)}
    assert len(digests) == 2
    artifact = artifact_of(model, tmp_path)
    assert (artifact / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert set(load_tokenizer(artifact).chat_template) == {"default", "tool_use"}


def test_what_was_left_out_is_in_events_and_report(plain: Path, tmp_path: Path) -> None:
    run = run_on(plain, tmp_path, model_notes=("left out: x.py",))
    assert "left out: x.py" in run.report.notes
    assert ("model_files", "left out: x.py") in [
        (message.code, message.message) for message in run.messages if isinstance(message, Noted)
    ]


def add(**tensors: Tensor) -> Edit:
    def edit(folder: Path) -> None:
        save_file({**load_file(folder / SINGLE), **tensors}, folder / SINGLE)

    return edit


def per_layer(name: str, value: Tensor) -> Edit:
    return add(**{f"model.layers.{layer}.{name}": value.clone() for layer in range(2)})


def copied_layer(folder: Path) -> None:
    """A third layer of a model of two, as for speculation, with parts of its own."""
    stored = load_file(folder / SINGLE)
    last, beyond = "model.layers.1.", "model.layers.2."
    layer = {n.replace(last, beyond): value.clone() for n, value in stored.items() if n.startswith(last)}
    layer[f"{beyond}eh_proj.weight"] = torch.randn(64, 128)
    add(**layer)(folder)


EXTRA: dict[str, tuple[Edit, str, str]] = {
    "old rotary buffers": (
        per_layer("self_attn.rotary_emb.inv_freq", torch.ones(8)), "rotary_emb.inv_freq and 1 more", "llama",
    ),
    "old buffers that are infinite": (
        per_layer("self_attn.masked_bias", torch.tensor(-torch.inf)), "masked_bias and 1 more", "llama",
    ),
    "a value head": (
        add(**{"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.tensor(torch.nan)}),
        "v_head.summary.bias and 1 more", "llama",
    ),
    "layers beyond the config": (copied_layer, "model.layers.2.", "llama"),
    "a layer for speculation": (copied_layer, "model.layers.2.", "deepseek_v3"),
}  # fmt: skip
CHANGES = {"llama": {}, "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 32, "n_group": 2, "topk_group": 1}}


@pytest.mark.parametrize(("edit", "noted", "model_type"), EXTRA.values(), ids=list(EXTRA))
def test_tensors_beyond_the_model_are_copied_noted_and_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Edit, noted: str, model_type: str
) -> None:
    plain = save_model(random_model(model_type, **CHANGES[model_type]), tmp_path / "plain")  # type: ignore[arg-type]
    expected = answer(artifact_of(plain, tmp_path / "first"))
    before = load_file(plain / SINGLE)
    edit(plain)
    run = run_on(plain, tmp_path / "second")
    notes = [message for message in run.messages if isinstance(message, Noted)]
    (note,) = [message.message for message in notes if message.code == "unused_tensors"]
    assert noted in note
    assert note in run.report.notes
    artifact = run.folder("compressed-tensors")
    written, extra = load_file(artifact / SINGLE), load_file(plain / SINGLE)
    for name in extra.keys() - before.keys():
        assert torch.equal(written[name], extra[name]) or bool(extra[name].isnan().any())
    with caplog.at_level(logging.WARNING):
        assert answer(artifact) == expected
    assert [record.getMessage() for record in caplog.records if noted in record.getMessage()]


@pytest.mark.parametrize(
    ("part", "code", "why"),
    [
        ("bias", "weights_mismatch", "is a part of a linear"),
        ("weight_scale_inv", "quantized_source_invalid", "of a quantized weight, and config.json has no"),
    ],
)
def test_a_part_of_a_linear_that_the_config_does_not_ask_for_is_refused(
    plain: Path, tmp_path: Path, part: str, code: str, why: str
) -> None:
    """Left out, it would change what the model computes."""
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    add(**{f"model.layers.0.self_attn.q_proj.{part}": torch.ones(64)})(model)
    with pytest.raises(ModelRefused, match=rf"q_proj\.{part},? {why}") as refusal:
        run_job(assignment(tiny_spec(RECIPE), model, tmp_path / "work"), lambda _: None)
    assert refusal.value.code == code
