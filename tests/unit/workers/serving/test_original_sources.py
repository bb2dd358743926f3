"""Originals in our own server: from whatever form a job reads, the weights that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.adapters import DOWN, factors, write_adapter
from tests.quantized_sources import BLOCK, fp8_source
from tests.tiny_gguf import FILE, write_gguf
from tests.tiny_models import random_model, tiny_model
from workers.serving.loading import LoadRequest, load_model
from workers.serving.tokenization import Tokenization

WEIGHTS = "model.safetensors"
Source = tuple[LoadRequest, dict[str, Tensor]]


def request(folder: Path, adapter: Path | None = None) -> LoadRequest:
    return LoadRequest(folder, torch.device("cpu"), torch.float32, is_original=True, adapter=adapter)


def as_it_is(folder: Path) -> Source:
    return request(tiny_model(folder / "plain")), load_file(folder / "plain" / WEIGHTS)


def quantized(folder: Path) -> Source:
    """FP8 in blocks, multiplied out here by the formula of its layout."""
    stored = load_file(fp8_source(tiny_model(folder / "plain"), folder / "fp8") / WEIGHTS)
    values: dict[str, Tensor] = {}
    for name, weight in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            values[name] = weight.float() * spread[: weight.shape[0], : weight.shape[1]]
        elif not name.endswith("_scale_inv"):
            values[name] = weight
    return request(folder / "fp8"), values


def merged(folder: Path) -> Source:
    plain, parts = tiny_model(folder / "plain"), factors((64, 128))
    tensors = load_file(plain / WEIGHTS)
    change = parts[f"{DOWN}.lora_B.weight"] @ parts[f"{DOWN}.lora_A.weight"]
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"] + 2 * change  # lora_alpha / r
    return request(plain, write_adapter(folder / "adapter", parts)), tensors


def gguf(folder: Path) -> Source:
    write_gguf(random_model("llama"), folder / "gguf")
    judge = AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file=FILE, dtype=torch.float32)
    # What the file's config says that its weights are.
    halves = {name: value.half() if value.dim() > 1 else value for name, value in judge.state_dict().items()}
    return request(folder / "gguf"), halves


@pytest.mark.parametrize("source", [as_it_is, quantized, merged, gguf])
def test_the_weights_are_those_that_a_job_starts_from(
    source: Callable[[Path], Source], tmp_path: Path
) -> None:
    asked, expected = source(tmp_path)
    loaded = load_model(asked)
    assert loaded.kernels == {}  # nothing computes from packed weights
    state = loaded.model.state_dict()
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value.float(), rtol=1e-6, atol=1e-6, msg=name)
    with asked.text_folder() as folder:
        tokenization = Tokenization(folder, 4096)
    assert tokenization.decode(tokenization.encode("the city", special_tokens=False)) == "the city"
