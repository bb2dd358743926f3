"""Checkpoints: what is saved comes back, and what is broken or foreign is never used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from workers.child.layer_checkpoints import LayerCheckpoints, resume_layer
from workers.child.stamped_files import identity_digest

from app.core.child.assignment import Checkpointed
from app.core.formats.file_format import Scheme
from app.core.jobs.report import LayerReport, LinearReport
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.layer import LayerResult


class Notes:
    """Collects what was announced."""

    def __init__(self) -> None:
        self.said: list[Checkpointed] = []

    def __call__(self, message: Checkpointed) -> None:
        self.said.append(message)


def opened(folder: Path, identity: str = "mine", notes: Notes | None = None) -> LayerCheckpoints:
    return LayerCheckpoints(folder / "checkpoints", identity, notes or Notes())


def layer_result(seed: int = 0, *, symmetric: bool = False) -> LayerResult:
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits=3, group_size=32, symmetric=symmetric)
    weight = QuantizedWeight(
        torch.randint(0, 8, (4, 64), generator=generator).to(torch.uint8),
        torch.rand(4, 2, generator=generator),
        torch.randint(0, 8, (4, 2), generator=generator).to(torch.uint8),
        scheme,
    )
    return LayerResult({"mlp.up_proj": weight}, {"input_layernorm.weight": torch.rand(8)}, [])


def report(layer: int) -> LayerReport:
    linear = LinearReport(linear="mlp.up_proj", bits=3, loss=0.1 + 0.2, ratio=1 / 3)
    return LayerReport(layer=layer, seconds=0.1, equivalence_error=1e-7, linears=(linear,))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_comes_back(tmp_path: Path, *, symmetric: bool) -> None:
    saved = layer_result(symmetric=symmetric)
    opened(tmp_path).save_layer(1, saved, report(3))
    checkpoints = opened(tmp_path)
    loaded = checkpoints.load_layer(1, 3)
    assert loaded.quantized["mlp.up_proj"].equals(saved.quantized["mlp.up_proj"])
    assert loaded.dense.keys() == saved.dense.keys()
    assert torch.equal(loaded.dense["input_layernorm.weight"], saved.dense["input_layernorm.weight"])
    assert checkpoints.layer_report(1, 3) == report(3)


def test_a_saved_file_is_announced_when_it_is_complete(tmp_path: Path) -> None:
    present: list[bool] = []
    folder = tmp_path / "checkpoints"
    checkpoints = LayerCheckpoints(
        folder, "mine", lambda message: present.append((folder / message.key).exists())
    )
    checkpoints.save_layer(0, layer_result(), report(0))
    assert present == [True]
    assert [file.name for file in folder.iterdir()] == ["layer-00000-recipe-00.safetensors"]


def test_a_layer_is_done_when_every_recipe_is(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    assert resume_layer(checkpoints, 3, 2) == 0
    for layer, recipe in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        checkpoints.save_layer(recipe, layer_result(), report(layer))
    assert checkpoints.is_done(0, 2)
    assert not checkpoints.is_done(1, 2)
    assert resume_layer(checkpoints, 3, 2) == 1
    checkpoints.save_layer(1, layer_result(), report(1))
    assert resume_layer(checkpoints, 3, 2) == 3


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_not_used(tmp_path: Path, kept: int) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.save_layer(0, layer_result(), report(0))
    file = checkpoints.folder / checkpoints.layer_key(0, 0)
    file.write_bytes(file.read_bytes()[:kept])
    assert not checkpoints.is_done(0, 1)
    assert resume_layer(checkpoints, 1, 1) == 0


def test_an_unfinished_file_is_not_used(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.save_layer(0, layer_result(), report(0))
    file = checkpoints.folder / checkpoints.layer_key(0, 0)
    file.rename(file.with_suffix(".partial"))
    assert resume_layer(checkpoints, 1, 1) == 0


def test_files_of_other_work_are_not_used(tmp_path: Path) -> None:
    first = opened(tmp_path, "mine")
    first.save_layer(0, layer_result(), report(0))
    first.save_states(1, [torch.zeros(1, 2, 3)])
    other = opened(tmp_path, "another")
    assert resume_layer(other, 1, 1) == 0
    assert other.latest_states(1) is None
    other.save_layer(0, layer_result(1), report(0))
    assert resume_layer(other, 1, 1) == 1
    assert resume_layer(first, 1, 1) == 0


def test_identity_follows_every_part() -> None:
    base = identity_digest(model="a", tokens="b", recipes=[{"bits": 4}])
    assert base == identity_digest(recipes=[{"bits": 4}], tokens="b", model="a")
    assert base != identity_digest(model="a", tokens="b", recipes=[{"bits": 3}])
    assert base != identity_digest(model="a", tokens="c", recipes=[{"bits": 4}])


def test_states_come_back_in_order_and_replace_older_ones(tmp_path: Path) -> None:
    notes = Notes()
    checkpoints = opened(tmp_path, notes=notes)
    batches = [torch.full((2, 4, 8), float(number)) for number in range(12)]
    checkpoints.save_states(2, [torch.zeros(2, 4, 8)])
    checkpoints.save_states(5, batches)
    assert [(note.key, note.replaces) for note in notes.said] == [
        ("states-00002.safetensors", None),
        ("states-00005.safetensors", "states-00002.safetensors"),
    ]
    assert [file.name for file in checkpoints.folder.iterdir()] == ["states-00005.safetensors"]
    again = opened(tmp_path)
    assert again.latest_states(4) is None
    found = again.latest_states(7)
    assert found is not None
    layer, loaded = found
    assert layer == 5
    assert len(loaded) == 12
    assert all(torch.equal(one, two) for one, two in zip(loaded, batches, strict=True))


def test_states_that_were_found_are_replaced_by_the_next(tmp_path: Path) -> None:
    opened(tmp_path).save_states(1, [torch.zeros(1)])
    again = opened(tmp_path)
    assert again.latest_states(3) is not None
    again.save_states(4, [torch.ones(1)])
    assert [file.name for file in again.folder.iterdir()] == ["states-00004.safetensors"]
