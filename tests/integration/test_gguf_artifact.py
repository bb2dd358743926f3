"""Jobs with the format gguf: one file, read back as it is evaluated, opened by gguf and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.core.errors import ModelRefused, VerificationFailed
from app.core.formats.gguf import BLOCKS
from app.core.records.specs import Recipe
from tests.tiny_gguf import write_gguf
from tests.tiny_models import TOKENIZER, EngineRun, random_model, save_model, tiny_spec
from workers.formats.folders import folder_class
from workers.formats.gguf_folder import GgufFolder, rope_factors

TEXT = "The king said: 'tis 1984!\n\n  And so  on. <|im_start|>user\nnaïve café<|im_end|>"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def quantized(model_type: str, folder: Path, recipe: Recipe | None = None, **changes: object) -> EngineRun:
    model = save_model(random_model(model_type, **changes), folder / "model")  # type: ignore[arg-type]
    return EngineRun(tiny_spec(recipe or Recipe(), formats=("gguf",)), model, folder / "work")


def opened(run: EngineRun) -> GgufFolder:
    plan = run.opened.plan
    written = folder_class("gguf")(
        run.folder("gguf"), "gguf", run.opened.checkpoint, plan, plan.candidates[0]
    )
    assert isinstance(written, GgufFolder)
    return written


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    return quantized("llama", tmp_path_factory.mktemp("llama"))


def test_the_artifact_is_one_file_that_holds_everything(run: EngineRun) -> None:
    folder = run.folder("gguf")
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    reader = GGUFReader(folder / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.attn_q.weight"] == "Q4_1"
    assert kinds["blk.0.attn_norm.weight"] == kinds["token_embd.weight"] == "F32"
    assert len(kinds) == 2 * 9 + 3
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["llama.context_length"] == 256
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == (TOKENIZER / "chat_template.jinja").read_text("utf-8")
    assert values["general.quantized_by"].startswith("nibble ")
    planned = run.opened.plan.candidates[0].output_bytes["gguf"]
    assert planned == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert run.report.candidates[0].bytes == {"gguf": (folder / "model.gguf").stat().st_size}


@pytest.mark.parametrize("bits_and_symmetry", BLOCKS, ids=lambda key: BLOCKS[key].name)
def test_transformers_opens_what_was_evaluated(tmp_path: Path, bits_and_symmetry: tuple[int, bool]) -> None:
    bits, symmetric = bits_and_symmetry
    recipe = Recipe(bits=bits, symmetric=symmetric, rounding="gptq")
    run = quantized("llama", tmp_path, recipe)
    folder = run.folder("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    windows = run.texts().evaluation.tokens
    with torch.inference_mode():
        losses = [model(row[None], labels=row[None]).loss.double() for row in windows]
    (candidate,) = run.report.candidates
    assert torch.stack(losses).mean().exp().item() == pytest.approx(candidate.perplexity, rel=1e-5)
    own, other = (
        AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf"),
        AutoTokenizer.from_pretrained(TOKENIZER),
    )
    assert own(TEXT)["input_ids"] == other(TEXT)["input_ids"]
    assert own.chat_template == other.chat_template


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrices_that_keep_their_precision_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows of q and k are in llama.cpp's order there too; vectors are float32."""
    model = random_model("llama", dtype)
    recipe = Recipe(method="rtn", ignore=("lm_head", r"re:model\.layers\.0\.self_attn\..*"))
    run = EngineRun(
        tiny_spec(recipe, formats=("gguf",)), save_model(model, tmp_path / "model"), tmp_path / "work"
    )
    written = opened(run).reader()
    state = model.state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(written.tensor(name), state[name].to(written.tensor(name).dtype))
    assert written.tensors["model.layers.0.self_attn.k_proj.weight"].dtype in ("F16", "BF16")
    assert written.tensors["model.layers.0.input_layernorm.weight"].dtype == "F32"
    names = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(opened(run).path).tensors}
    assert names["blk.0.attn_q.weight"] == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert names["blk.1.attn_q.weight"] == "Q4_1"


def test_a_quantized_head_is_in_blocks(tmp_path: Path) -> None:
    run = quantized("qwen2", tmp_path, Recipe(method="rtn", ignore=()))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(opened(run).path).tensors}
    assert kinds["output.weight"] == "Q4_1"
    assert kinds["blk.0.attn_q.bias"] == "F32"


def test_a_damaged_file_is_seen(run: EngineRun, tmp_path: Path) -> None:
    written = opened(run)
    load = run.checkpoints().load_layer
    written.verify(lambda layer: load(0, layer))
    tensor = written.reader().tensors["model.layers.1.mlp.up_proj.blocks"]
    content = bytearray(written.path.read_bytes())
    content[tensor.start + 7] ^= 1
    written.path = tmp_path / "model.gguf"
    written.path.write_bytes(content)
    with pytest.raises(VerificationFailed, match=r"layer 1: mlp\.up_proj read back from the gguf files"):
        written.verify(lambda layer: load(0, layer))


def test_a_gguf_model_becomes_one(tmp_path: Path) -> None:
    """Read, quantized anew and written: names, rows and the tokenizer go there and back."""
    folder = write_gguf(random_model("llama"), tmp_path / "model", tied=True)
    run = EngineRun(tiny_spec(Recipe(bits=8, symmetric=True), formats=("gguf",)), folder, tmp_path / "work")
    names = {tensor.name for tensor in GGUFReader(opened(run).path).tensors}
    (source,) = folder.glob("*.gguf")
    assert names == {tensor.name for tensor in GGUFReader(source).tensors}
    tokenizer = AutoTokenizer.from_pretrained(run.folder("gguf"), gguf_file="model.gguf")
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(TOKENIZER)(TEXT)["input_ids"]


def test_llama_3_has_factors_of_its_frequencies(tmp_path: Path) -> None:
    run = quantized("llama", tmp_path, Recipe(method="rtn"), rope_parameters=LLAMA3)
    factors = rope_factors(opened(run).config)
    assert factors is not None
    (stored,) = (
        tensor for tensor in GGUFReader(opened(run).path).tensors if tensor.name == "rope_freqs.weight"
    )
    assert torch.equal(torch.from_numpy(stored.data.copy()), factors)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not end in plain bytes"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "puts a space before every text"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
                {**BYTES, "use_regex": False},
            ]}},
            "no name here for the rules",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
    ],
    ids=["whitespace", "prefix", "regex", "lowercase"],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path: Path, change: dict[str, object], why: str
) -> None:
    model = save_model(random_model("llama"), tmp_path / "model")
    rules = json.loads((model / "tokenizer.json").read_text("utf-8"))
    (model / "tokenizer.json").write_text(json.dumps({**rules, **change}))
    with pytest.raises(ModelRefused, match=why) as refusal:
        EngineRun(tiny_spec(Recipe(), formats=("gguf",)), model, tmp_path / "work")
    assert refusal.value.code == "gguf_tokenizer_unsupported"
