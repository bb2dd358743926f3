"""A folder of each format: complete, and checked to the last byte."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.core.errors import NibbleError, VerificationFailed
from app.core.records.specs import Override, Recipe
from app.core.sources.safetensors_header import TensorHeader
from tests.tiny_models import TOKENIZER, EngineRun, random_model, save_model, tiny_spec
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.layer import LayerResult

FORMATS = ("awq", "compressed-tensors", "gptq")
RECIPE = Recipe(group_size=32, ignore=("lm_head", r"re:.*layers\.1\.mlp\.down_proj"))


class Written:
    """An engine run's folder of one format, with what its layers should hold."""

    def __init__(self, run: EngineRun, name: str) -> None:
        source, plan = run.opened.checkpoint, run.opened.plan
        self.checkpoints = run.checkpoints()
        self.folder = FormatFolder(run.folder(name), name, source, plan, plan.candidates[0])  # type: ignore[arg-type]

    def load_layer(self, layer: int) -> LayerResult:
        return self.checkpoints.load_layer(0, layer)

    def header(self, name: str) -> TensorHeader:
        return Checkpoint(self.folder.folder).tensors[name]

    def flip(self, position: int) -> None:
        """Change one bit of the file."""
        file = self.folder.folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)


def engine_run_of(folder: Path, formats: tuple[str, ...], recipe: Recipe) -> EngineRun:
    model = save_model(random_model("qwen2", torch.bfloat16), folder / "model")
    (model / "quant_config.json").write_text('{"w_bit": 3}')
    (model / "quantize_config.json").write_text('{"bits": 3}')
    (model / "merges.txt").write_text("a b\n")
    return EngineRun(tiny_spec(recipe, formats=formats), model, folder / "work")


@pytest.fixture
def name() -> str:
    return "awq"


@pytest.fixture
def engine_run(tmp_path: Path, name: str) -> EngineRun:
    """A run that makes the format `name`, which most tests vary."""
    if name == "gptq":
        symmetric = RECIPE.model_copy(update={"symmetric": True})
        return engine_run_of(tmp_path, ("gptq", "compressed-tensors"), symmetric)
    return engine_run_of(tmp_path, ("awq", "compressed-tensors"), RECIPE)


@pytest.mark.parametrize("name", FORMATS)
def test_any_flipped_bit_is_noticed(engine_run: EngineRun, name: str) -> None:
    written = Written(engine_run, name)
    written.folder.verify(written.load_layer)
    linear = "model.layers.1.self_attn.q_proj."
    stored = Checkpoint(written.folder.folder).tensors
    tensors = [name for name in stored if name.startswith(linear) and not name.endswith((".bias", "_shape"))]
    assert len(tensors) == {"awq": 3, "gptq": 4, "compressed-tensors": 3}[name]
    tensors += ["model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.bias"]
    for tensor in tensors:
        header = written.header(tensor)
        for position in (header.start, (header.start + header.end) // 2 // 2 * 2):
            written.flip(position)
            with pytest.raises(VerificationFailed, match=tensor.rpartition(".")[0].rpartition(".")[2]):
                written.folder.verify(written.load_layer)
            written.flip(position)
    written.folder.verify(written.load_layer)


def test_a_missing_tensor_or_file_end_is_noticed(engine_run: EngineRun) -> None:
    written = Written(engine_run, "awq")
    file = written.folder.folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(NibbleError):
        written.folder.verify(written.load_layer)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_quantized_is_copied_bit_for_bit(engine_run: EngineRun, name: str) -> None:
    folder = engine_run.folder(name)
    before = load_file(engine_run.opened.checkpoint.folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    kept = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    kept += ["model.layers.1.mlp.down_proj.weight"]
    for tensor in kept:
        assert after[tensor].dtype == torch.bfloat16
        assert torch.equal(after[tensor], before[tensor])
    assert "model.layers.0.mlp.down_proj.weight" not in after
    biases = {key for key in before if key.endswith(".bias")}
    assert biases == {key for key in after if key.endswith(".bias")}


@pytest.mark.parametrize("name", FORMATS)
def test_the_folder_has_all_that_a_loader_needs(engine_run: EngineRun, name: str) -> None:
    folder = engine_run.folder(name)
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "merges.txt", "model.safetensors",
        *(["quantize_config.json"] if name == "gptq" else []),
    }  # fmt: skip
    assert (folder / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    source = engine_run.opened.checkpoint.folder
    generation = "generation_config.json"
    assert (folder / generation).read_bytes() == (source / generation).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == name


def test_the_awq_entry(engine_run: EngineRun) -> None:
    config = json.loads((engine_run.folder("awq") / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"],
    }


def test_the_gptq_entry_is_in_two_files(tmp_path: Path) -> None:
    recipe = Recipe(
        group_size=32,
        symmetric=True,
        ignore=("lm_head", r"re:.*\.0\.self_attn\.o_proj"),
        overrides=(
            Override(match="mlp.down_proj", bits=8, group_size=64),
            Override(match=r"re:.*\.1\.mlp\.(gate|up)_proj", bits=3),
        ),
    )
    folder = engine_run_of(tmp_path, ("gptq",), recipe).folder("gptq")
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == entry
    assert entry == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {
            r"-:^(.*\.)?layers\.0\.self_attn\.o_proj$": {},
            r"+:^(.*\.)?layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 64},
            r"+:^(.*\.)?layers\.1\.mlp\.(gate_proj|up_proj|gate_up_proj)$": {"bits": 3, "group_size": 32},
        },
        "meta": {"quantizer": [f"nibble:{version('nibble')}"]},
    }


def test_weight_bytes_are_the_files(engine_run: EngineRun) -> None:
    written = Written(engine_run, "awq")
    size = (written.folder.folder / "model.safetensors").stat().st_size
    assert written.folder.weight_bytes == size == engine_run.report.candidates[0].bytes["awq"]
