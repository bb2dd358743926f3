"""Models that were quantized before as models of jobs: read as others dequantize them, quantized, opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from app.core.child.assignment import Checkpointed
from app.core.errors import ModelRefused
from app.core.formats.registry import FormatName
from app.core.jobs.estimate import estimate
from app.core.jobs.submission import check_submission
from app.core.records.specs import JobSpec, Recipe
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.sources.quantized_model import inspect_original
from kernels.layouts import pack_gptq, unpack_gptq
from kernels.operators import dequantize
from kernels.weight import PackedWeight
from tests.quantized_sources import (
    FP4,
    WEIGHTS,
    Stored,
    fp8_block,
    fp8_source,
    gpt_oss_source,
    modelopt_source,
    mxfp4_source,
    with_config,
)
from tests.tiny_models import EngineRun, assignment, fitted_architecture, tiny_model, tiny_spec
from workers.child.job_run import run_job
from workers.formats.packings import packing_of
from workers.modeling import checkpoint as checkpoints
from workers.modeling.checkpoint import Checkpoint

BF16 = torch.bfloat16
BLOCKS = {"hidden_size": 256, "intermediate_size": 384, "dtype": BF16}  # which transformers wants whole
OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "dtype": BF16,
}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain") / "llama", "llama", **BLOCKS)


@pytest.fixture(scope="module")
def fp8(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8_source(plain, tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oss")
    return gpt_oss_source(tiny_model(folder / "plain", "gpt_oss", **OSS), folder / "model")


@pytest.fixture(scope="module")
def run(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    return EngineRun(tiny_spec(Recipe(group_size=32)), fp8, tmp_path_factory.mktemp("work"))


def opened(folder: Path) -> PreTrainedModel:
    """By transformers, which dequantizes on a CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    return model


def original(folder: Path) -> Checkpoint:
    """As a job reads it."""
    return Checkpoint(folder, inspect_original)


def read(folder: Path) -> Stored:
    source = original(folder)
    return {name: source.tensor(name) for name in source.tensors}


def test_fp8_in_blocks_is_as_transformers_dequantizes_it(fp8: Path) -> None:
    own, other = read(fp8), opened(fp8).state_dict()
    assert own.keys() == other.keys()
    for name, value in other.items():
        assert own[name].dtype == BF16
        assert torch.equal(own[name], value), name
    assert original(fp8).source.types == {"FP8 in blocks of 128x128": 14, "BF16": 7}


def test_experts_of_gpt_oss_are_as_transformers_dequantizes_them(oss: Path) -> None:
    """Each expert's matrices, rows of gate and up in turn; transformers has them transposed."""
    source, other = original(oss), opened(oss).state_dict()
    architecture = fitted_architecture(source)
    source = source.with_experts(architecture.stored_layers, architecture.kinds)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        up_gate, down = other[f"{stem}.gate_up_proj"], other[f"{stem}.down_proj"]
        for expert in range(4):
            for leaf, value in (
                ("gate_proj", up_gate[expert].T[::2]),
                ("up_proj", up_gate[expert].T[1::2]),
                ("down_proj", down[expert].T),
            ):
                assert torch.equal(source.tensor(f"{stem}.{expert}.{leaf}.weight"), value), (expert, leaf)
    assert source.source.types == {"BF16": 33, "MXFP4": 4}


def test_blocks_that_are_cut_are_as_published(tmp_path: Path) -> None:
    """As in DeepSeek-V3 itself, whose projection of 576 rows transformers 5.24 refuses."""
    folder = fp8_source(tiny_model(tmp_path / "plain", hidden_size=192, intermediate_size=320, dtype=BF16),
                        tmp_path / "fp8")  # fmt: skip
    stored, own = load_file(folder / WEIGHTS), read(folder)
    for name, scale in stored.items():
        if name.endswith("_scale_inv"):
            codes = stored[name.removesuffix("_scale_inv")]
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = (codes.float() * whole[: codes.shape[0], : codes.shape[1]]).to(BF16)
            assert torch.equal(own[name.removesuffix("_scale_inv")], expected), name


def test_nvfp4_of_modelopt_multiplies(plain: Path, tmp_path: Path) -> None:
    folder = modelopt_source(plain, tmp_path / "model")
    stored, own, before = load_file(folder / WEIGHTS), read(folder), load_file(plain / WEIGHTS)
    codes, scales, factor = (stored[f"{UP}{end}"] for end in ("", "_scale", "_scale_2"))
    values = FP4[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()]
    expected = (values * (scales.float() * factor).repeat_interleave(16, 1)).to(BF16)
    assert torch.equal(own[UP], expected)
    assert (own[UP].float() - before[UP].float()).norm() < 0.12 * before[UP].float().norm()
    assert own.keys() == before.keys()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=32), Recipe(group_size=32, bits=3, symmetric=True), Recipe(group_size=-1, bits=8),
        *(Recipe(scheme=scheme) for scheme in ("fp8", "fp8-block", "nvfp4", "mxfp4", "w8a8", "w8a8-static")),
    ],
    ids=lambda recipe: recipe.label,
)  # fmt: skip
def test_files_of_compressed_tensors_are_as_it_dequantizes_them(
    plain: Path, tmp_path: Path, recipe: Recipe
) -> None:
    run = EngineRun(tiny_spec(recipe.model_copy(update={"method": "rtn"})), plain, tmp_path)
    folder = run.folder("compressed-tensors")
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = entry["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    stored, own = load_file(folder / WEIGHTS), read(folder)
    assert own.keys() == load_file(plain / WEIGHTS).keys()
    linears = [name for name in own if "_proj" in name]
    assert len(linears) == 14
    for name in linears:
        module = name.removesuffix("weight")
        state = {key.removeprefix(module): value for key, value in stored.items() if key.startswith(module)}
        judged = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(own[name], judged.to(BF16)), name


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("awq", Recipe(method="rtn", group_size=32)),
        *(("gptq", Recipe(method="rtn", group_size=64, bits=bits, symmetric=True)) for bits in (2, 3, 4, 8)),
    ],
)  # fmt: skip
def test_awq_and_gptq_files_are_as_they_are_served(
    plain: Path, tmp_path: Path, name: FormatName, recipe: Recipe
) -> None:
    folder = EngineRun(tiny_spec(recipe, formats=(name,)), plain, tmp_path).folder(name)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, own = load_file(folder / WEIGHTS), read(folder)
    for linear in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        served = packing_of(name).unpack_linear(
            {key.removeprefix(f"{linear}."): value for key, value in stored.items() if linear in key}, entry
        )
        assert isinstance(served, PackedWeight)
        values = dequantize(served.qweight, served.scale, served.zero, served.bits, served.group_size,
                            served.in_features, BF16)  # fmt: skip
        assert torch.equal(own[f"{linear}.weight"], values), linear


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_channels_of_gptq_in_any_order(plain: Path, tmp_path: Path, version: str) -> None:
    """desc_act: the words hold the channels in their own order, g_idx the group of each."""
    recipe = Recipe(method="rtn", group_size=32, symmetric=True)
    folder = EngineRun(tiny_spec(recipe, formats=("gptq",)), plain, tmp_path / "work").folder("gptq")
    before = read(folder)
    stored, linear = load_file(folder / WEIGHTS), UP.removesuffix(".weight")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    codes = unpack_gptq(stored[f"{linear}.qweight"], 4, 256)
    stored[f"{linear}.qweight"] = pack_gptq(codes[order].contiguous(), 4)
    stored[f"{linear}.g_idx"] = stored[f"{linear}.g_idx"][order].contiguous()
    if version == "gptq_v2":
        stored |= {name: value + 0x11111111 for name, value in stored.items() if name.endswith(".qzeros")}
        entry = json.loads((folder / "config.json").read_text())["quantization_config"]
        with_config(folder, quantization_config={**entry, "checkpoint_format": version, "desc_act": True})
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    after = read(folder)
    assert torch.equal(after[UP], before[UP][:, order])
    assert all(torch.equal(after[name], before[name]) for name in before if name != UP)
    stored[f"{linear}.g_idx"][5] = 8
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelRefused, match="g_idx names groups beyond its 8") as refusal:
        read(folder)
    assert refusal.value.code == "quantized_source_invalid"


SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "fp8": fp8_source, "mxfp4": mxfp4_source, "modelopt": modelopt_source,
}  # fmt: skip


@pytest.mark.parametrize("make", SOURCES.values(), ids=list(SOURCES))
def test_rows_are_read_in_chunks_of_any_size(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, Path], Path]
) -> None:
    """No chunk is larger than was asked for, but 32 rows: a tensor takes no more memory than a plain one."""
    source = original(make(plain, tmp_path / "model"))
    whole = source.tensor(UP)
    for chunk_bytes in (1, 2**17, 2**24):
        monkeypatch.setattr(checkpoints, "CHUNK_BYTES", chunk_bytes)
        chunks = list(source.chunks(UP))
        assert torch.equal(torch.cat(chunks).view(whole.shape), whole)
        assert max(chunk.numel() for chunk in chunks) <= max(chunk_bytes // 4, 32 * 256)
        assert b"".join(source.raw_bytes(UP)) == whole.view(torch.uint8).numpy().tobytes()


def dequantized(folder: Path, dest: Path) -> Path:
    """The model as transformers dequantizes and saves it."""
    model = opened(folder)
    shutil.copytree(folder, dest)
    (dest / WEIGHTS).unlink()
    config = json.loads((dest / "config.json").read_text())
    tied = model.config.tie_word_embeddings
    state = {name: value.contiguous() for name, value in model.state_dict().items()
             if not (tied and name == "lm_head.weight")}  # fmt: skip
    save_file(state, dest / WEIGHTS, {"format": "pt"})
    del config["quantization_config"]
    (dest / "config.json").write_text(json.dumps(config))
    return dest


def tensors_by_expert(run: EngineRun) -> dict[str, Tensor]:
    """Of plain experts that keep their precision a layer has one tensor, of MXFP4 one each."""
    architecture = run.opened.plan.architecture
    files = Checkpoint(run.folder("compressed-tensors"))
    files = files.with_experts(architecture.stored_layers, architecture.kinds)
    return {name: files.tensor(name) for name in files.tensors}


@pytest.mark.parametrize("kind", ["fp8", "oss"])
def test_a_job_writes_what_it_writes_of_the_dequantized_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From FP8 in blocks, and from gpt-oss' MXFP4, to W4A16: every byte of the weights, every figure."""
    folder: Path = request.getfixturevalue(kind)
    spec = tiny_spec(Recipe(group_size=32, ignore=("lm_head", "re:.*layers\\.1\\.mlp.*")))
    runs = [
        EngineRun(spec, model, tmp_path / name)
        for name, model in (("own", folder), ("other", dequantized(folder, tmp_path / "plain")))
    ]
    own, other = map(tensors_by_expert, runs)
    assert own.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(own[name].view(torch.uint8), value.view(torch.uint8)), name
    ignored = [name for name in own if "layers.1." in name and name.endswith("down_proj.weight")]
    assert ignored
    assert {own[name].dtype for name in ignored} == {BF16}
    reports = [run.report for run in runs]
    assert reports[0].original == reports[1].original
    assert reports[0].candidates[0].perplexity == reports[1].candidates[0].perplexity
    config = json.loads((runs[0].folder("compressed-tensors") / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_the_artifact_is_a_model_that_transformers_opens(run: EngineRun, fp8: Path) -> None:
    """It has none of the entry before, and the original of the report is the dequantized model."""
    config = json.loads((run.folder("compressed-tensors") / "config.json").read_text())
    assert "weight_block_size" not in config["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(run.folder("compressed-tensors"), dtype=torch.float32)
    before = opened(fp8).float()
    windows = run.texts().evaluation.tokens
    (candidate,) = run.report.candidates
    for judged, perplexity in ((model, candidate.perplexity), (before, run.report.original.perplexity)):
        with torch.inference_mode():
            losses = [judged(row[None], labels=row[None]).loss.double() for row in windows]
        assert torch.stack(losses).mean().exp().item() == pytest.approx(perplexity, rel=2e-3)
    assert run.report.source is not None
    assert run.report.source.format == "safetensors"
    assert run.report.source.types == {"FP8 in blocks of 128x128": 14, "BF16": 7}


def test_a_resumed_run_writes_the_same_bytes(run: EngineRun, fp8: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die_after_a_layer(message: object) -> None:
        if isinstance(message, Checkpointed):
            raise Killed

    job = assignment(tiny_spec(Recipe(group_size=32)), fp8, tmp_path / "work")
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


def test_a_service_tells_the_source_in_estimate_and_job(fp8: Path, plain: Path, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state", model_roots=(fp8.parent, plain.parent))

    def checked(folder: Path) -> Any:
        return check_submission(JobSpec(model=folder.as_uri(), recipe=Recipe(group_size=32)), settings)

    note = next(note for note in estimate(checked(fp8), "cpu").notes if "quantized before" in note)
    assert "(fp8; tensors: 14 in FP8 in blocks of 128x128)" in note
    assert "what that lost is not measured here" in note
    assert checked(fp8).plan.model_bytes == checked(plain).plan.model_bytes
    with ModelCache(tmp_path / "cache", settings) as cache:
        assert note in cache.fetch(fp8.as_uri(), lambda _: None).notes


def changed(folder: Path, dest: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    shutil.copytree(folder, dest)
    tensors = load_file(dest / WEIGHTS)
    change(tensors[name])
    save_file(tensors, dest / WEIGHTS, {"format": "pt"})
    return dest


def test_numbers_that_are_none_are_refused(fp8: Path, tmp_path: Path) -> None:
    folder = changed(fp8, tmp_path / "model", UP, lambda codes: codes.view(torch.uint8)[3].fill_(0x7F))
    with pytest.raises(ModelRefused) as refusal:
        original(folder).tensor(UP)
    assert refusal.value.code == "weights_not_finite"
    assert UP in refusal.value.message


def test_a_shape_that_the_file_contradicts_is_refused(plain: Path, tmp_path: Path) -> None:
    run = EngineRun(tiny_spec(Recipe(method="rtn", group_size=32)), plain, tmp_path / "work")
    name = UP.replace("weight", "weight_shape")
    folder = changed(run.folder("compressed-tensors"), tmp_path / "model", name, lambda shape: shape.add_(1))
    with pytest.raises(ModelRefused, match=r"weight_shape is \(385, 257\)") as refusal:
        original(folder).tensor(UP)
    assert refusal.value.code == "quantized_source_invalid"


def test_one_scale_for_a_matrix(plain: Path, tmp_path: Path) -> None:
    """And experts in FP8 as transformers itself holds them: in one tensor, with `_scale_inv` beside it."""
    folder = shutil.copytree(plain, tmp_path / "model")
    weight = load_file(plain / WEIGHTS)[UP]
    experts = torch.stack([weight, 2 * weight.flip(0)]).float()
    scale = experts.abs().amax(dim=(1, 2), keepdim=True) / 448
    codes = (experts / scale).to(torch.float8_e4m3fn)
    blocks = [fp8_block("e", expert) for expert in experts]
    stored = {
        "single.weight": codes[0].clone(), "single.weight_scale_inv": scale[0].view(()).clone(),
        "experts.up_proj": codes, "experts.up_proj_scale_inv": scale,
        "blocked.up_proj": torch.stack([each["e"] for each in blocks]),
        "blocked.up_proj_scale_inv": torch.stack([each["e_scale_inv"] for each in blocks]),
    }  # fmt: skip
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    with_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    own = read(folder)
    assert torch.equal(own["single.weight"], (codes[0].float() * scale[0]).to(BF16))
    assert torch.equal(own["experts.up_proj"], (codes.float() * scale).to(BF16))
    for number, each in enumerate(blocks):
        whole = each["e_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(own["blocked.up_proj"][number], (each["e"].float() * whole).to(BF16))
