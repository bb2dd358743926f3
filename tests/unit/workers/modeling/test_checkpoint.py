"""Reading weights: the same as safetensors' own reader, and never a broken tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.core.errors import ModelRefused
from tests.tiny_models import random_model, save_model
from workers.modeling.checkpoint import Checkpoint


def model_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(random_model("llama", dtype), tmp_path, max_shard_size="300KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    expected = {name: value for file in files for name, value in load_file(file).items()}
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        read = checkpoint.tensor(name)
        assert read.dtype == dtype
        assert torch.equal(read, value)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float64]
)
def test_other_dtypes_are_read_too(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12).view(3, 4).to(dtype)
    checkpoint = Checkpoint(model_folder(tmp_path, {"x": values, "empty": torch.empty(0, 4)}))
    assert torch.equal(checkpoint.tensor("x"), values)
    assert checkpoint.tensor("empty").shape == (0, 4)


def test_a_layer_is_read_by_names_within_it(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.up.weight": torch.full((2, 2), float(i)) for i in (1, 10)}
    layer = Checkpoint(model_folder(tmp_path, tensors)).layer_tensors("model.layers.1.")
    assert list(layer) == ["up.weight"]
    assert torch.equal(layer["up.weight"], torch.ones(2, 2))


def test_raw_bytes_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.modeling.checkpoint.CHUNK_BYTES", 8)
    values = torch.randn(5, 3)
    checkpoint = Checkpoint(model_folder(tmp_path, {"first": torch.zeros(3), "x": values}))
    pieces = list(checkpoint.raw_bytes("x"))
    assert max(map(len, pieces)) == 8
    assert b"".join(pieces) == values.numpy().tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    values = torch.zeros(4, 4, dtype=torch.bfloat16)
    values[2, 3] = bad
    checkpoint = Checkpoint(model_folder(tmp_path, {"good": torch.zeros(2), "layers.0.up": values}))
    assert checkpoint.tensor("good").numel() == 2
    with pytest.raises(ModelRefused, match=r"layers\.0\.up") as refusal:
        checkpoint.tensor("layers.0.up")
    assert refusal.value.code == "weights_not_finite"


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(model_folder(tmp_path, {"x": torch.zeros(64, 64)}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelRefused, match=r"model\.safetensors ended early"):
        checkpoint.tensor("x")


def test_a_truncated_file_is_refused_at_once(tmp_path: Path) -> None:
    file = model_folder(tmp_path, {"x": torch.zeros(64, 64)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelRefused) as refusal:
        Checkpoint(tmp_path)
    assert refusal.value.code == "model_header_invalid"
