"""Files written tensor by tensor, read by safetensors' own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from workers.formats.shards import INDEX, ShardWriter, TensorPlan, split_shards

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    plans = [TensorPlan(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    writer = ShardWriter(folder, plans, shard_bytes)
    for name, value in tensors.items():
        writer.write(name, value)
    writer.close()


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randint(0, 100, (index + 1, 5), generator=generator).to(dtype)
        for index, (name, dtype) in enumerate(zip("abcdef", DTYPES, strict=True))
    }


def read(folder: Path) -> dict[str, Tensor]:
    return {name: v for file in sorted(folder.glob("*.safetensors")) for name, v in load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [1, 50, 100, 10**9])
def test_safetensors_reads_what_was_written(tmp_path: Path, shard_bytes: int) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes)
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, 100)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert set(index["weight_map"].values()) == set(files)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_shards_hold_all_in_order_and_keep_the_limit(sizes: list[int], limit: int) -> None:
    plans = [TensorPlan(str(n), (size,), torch.uint8) for n, size in enumerate(sizes)]
    shards = split_shards(plans, limit)
    assert [plan for shard in shards for plan in shard] == plans
    for shard in shards:
        assert shard
        assert sum(plan.size for plan in shard) <= limit or len([p for p in shard if p.size]) == 1


def test_bytes_may_come_in_pieces(tmp_path: Path) -> None:
    values = torch.arange(10, dtype=torch.int32)
    content = values.numpy().tobytes()
    writer = ShardWriter(tmp_path, [TensorPlan("x", (10,), torch.int32)], 10**9)
    writer.write_bytes("x", iter([content[:7], content[7:]]))
    writer.close()
    assert torch.equal(read(tmp_path)["x"], values)


def test_a_tensor_that_is_not_planned_is_a_fault(tmp_path: Path) -> None:
    plans = [TensorPlan("a", (2,), torch.float32), TensorPlan("b", (2,), torch.float32)]
    writer = ShardWriter(tmp_path, plans, 10**9)
    with pytest.raises(AssertionError):
        writer.write("b", torch.zeros(2))
    with pytest.raises(AssertionError):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError):
        writer.write("a", torch.zeros(2, dtype=torch.float16))
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="1 tensors are missing"):
        writer.close()
    assert writer.file is not None
    writer.file.close()
