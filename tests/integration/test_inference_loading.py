"""Loading an artifact: memory, every architecture, and files that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from app.core.errors import ModelRefused
from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS
from app.core.records.specs import Recipe
from tests.inference import Served, dequantized, generated, greedy, prompts_of_text
from tests.integration.inference_process import REPOSITORY, environment
from tests.tiny_models import OTHER_MODELS, EngineRun, random_model, save_model, tiny_spec
from workers.modeling.stored_dtypes import DTYPES
from workers.serving.loading import LoadRequest, load_model

MEASURE = """
import json, sys
from pathlib import Path
import torch
from workers.serving.loading import LoadRequest, load_model
load_model(LoadRequest(Path(sys.argv[1]), torch.device("cpu")))  # libraries and kernels, loaded once
loaded = load_model(LoadRequest(Path(sys.argv[2]), torch.device("cpu")))
print(json.dumps([loaded.packed_bytes, loaded.peak_bytes, loaded.kernels]))
"""
SHAPE = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 256,
}  # fmt: skip
SCHEME = Scheme(bits=4, group_size=128, symmetric=True)


def write_large(folder: Path) -> Path:
    """About 130 MiB of random packed weights: no model has to be quantized to weigh loading."""
    folder.mkdir()
    config = AutoConfig.for_model("llama", **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            table = FORMATS["compressed-tensors"].tensors(
                module.out_features, module.in_features, SCHEME, "BF16"
            )
            for suffix, (shape, dtype) in table.items():
                tensors[f"{name}.{suffix}"] = filled(suffix, shape, DTYPES[dtype], module)
    for name, parameter in model.state_dict().items():
        if name.removesuffix(".weight") + ".weight_packed" not in tensors:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    body = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(body | {"quantization_config": entry}))
    return folder


def filled(suffix: str, shape: tuple[int, ...], dtype: torch.dtype, linear: torch.nn.Linear) -> torch.Tensor:
    if suffix == "weight_shape":
        return torch.tensor([linear.out_features, linear.in_features])
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    return torch.full(shape, 0.01, dtype=dtype)


def test_loading_takes_little_more_than_what_stays(small_artifact: Path, tmp_path: Path) -> None:
    """In a process of its own, where nothing else moves the peak."""
    large = write_large(tmp_path / "large")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small_artifact), str(large)],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    packed, peak, kernels = json.loads(result.stdout)
    assert packed > 100 * 1024**2
    assert peak <= 1.3 * packed, kernels


@pytest.mark.parametrize("name", sorted(OTHER_MODELS))
def test_every_architecture_is_served(name: str, tmp_path: Path) -> None:
    """Greedy answers, in a batch, are those of the model with dequantized weights."""
    model_type, changes = OTHER_MODELS[name]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    recipe = Recipe(method="rtn", group_size=32, symmetric=True)
    run = EngineRun(tiny_spec(recipe), model, tmp_path / "work")
    folder = run.folder("compressed-tensors")
    served = Served(folder, dtype=torch.float32)
    prompts = prompts_of_text(5)[1:]
    together = served.generate([greedy(prompt, 6) for prompt in prompts])
    judge = dequantized(folder, "compressed-tensors", tmp_path / "judge")
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer == generated(judge, prompt, 6)


def changed(
    folder: Path,
    artifact: Path,
    *,
    tensors: Callable[[dict[str, torch.Tensor]], object] = len,
    config: Callable[[dict[str, Any]], object] = len,
) -> Path:
    """A copy of an artifact with other tensors or another config.json."""
    folder.mkdir()
    stored = load_file(artifact / "model.safetensors")
    tensors(stored)
    save_file(stored, folder / "model.safetensors")
    body = json.loads((artifact / "config.json").read_text())
    config(body)
    (folder / "config.json").write_text(json.dumps(body))
    return folder


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": lambda t: t.pop("model.norm.weight")}, "lacks the tensor model.norm.weight"),
        ({"tensors": lambda t: t.pop("lm_head.weight")}, "lacks the tensor lm_head.weight"),
        (
            {"tensors": lambda t: t.update({f"{DOWN}.bias": torch.ones(64)})},
            f"no module of LlamaForCausalLM takes the tensor {DOWN}.bias",
        ),
        (
            {"tensors": lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(128, dtype=torch.int32)})},
            "grouped out of order",
        ),
        (
            {"tensors": lambda t: t.update({f"{DOWN}.weight_packed": torch.zeros(64, 9, dtype=torch.int32)})},
            "\\(64, 9\\) is not \\(64, 128\\) packed",
        ),
        ({"config": lambda c: c.update(intermediate_size=256)}, "is 128 x 64 in the files, and 256 x 64"),
        ({"config": lambda c: c.update(model_type="mamba")}, "mamba"),
        ({"config": lambda c: c["quantization_config"].update(format="marlin-24")}, "marlin-24"),
    ],
)
def test_files_that_can_t_be_served_are_refused(
    small_artifact: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelRefused, match=message):
        load_model(LoadRequest(changed(tmp_path / "a", small_artifact, **change), torch.device("cpu")))


def test_a_backend_that_is_not_there_is_refused(small_artifact: Path) -> None:
    with pytest.raises(ModelRefused, match="no-such") as refusal:
        load_model(LoadRequest(small_artifact, torch.device("cpu"), kernel_backend="no-such"))
    assert refusal.value.code == "kernel_unsupported"


def test_mixed_precision_and_tied_embeddings(tmp_path: Path) -> None:
    model = save_model(random_model("llama", tie_word_embeddings=True), tmp_path / "model")
    recipe = Recipe.model_validate(
        {
            "method": "rtn", "group_size": 32, "symmetric": True, "ignore": ["re:.*o_proj"],
            "overrides": [{"match": "re:.*down_proj", "bits": 8}],
        }
    )  # fmt: skip
    folder = EngineRun(tiny_spec(recipe), model, tmp_path / "work").folder("compressed-tensors")
    served = Served(folder, dtype=torch.float32)
    head, embedding = (served.loaded.model.get_submodule(name) for name in ("lm_head", "model.embed_tokens"))
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    kinds = sorted(name.partition(",")[2].partition(",")[0].strip() for name in served.loaded.kernels)
    assert set(kinds) == {"4 bits", "8 bits"}
    assert sum(served.loaded.kernels.values()) == 12
    assert len(served.generate([greedy([5, 6, 7], 4)])[0]) == 4
