"""What is saved of layers comes back bit by bit, and what is broken or of other work is never used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from app.core.child.assignment import Checkpointed
from app.core.formats.file_format import Scheme
from app.core.jobs.report import LayerReport, LinearReport
from workers.child.layer_files import LayerCheckpoints, StampedFolder, StatisticsStore, resume_layer
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.input_statistics import InputStatistics, LayerStatistics
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
    first, second = loaded.quantized["mlp.up_proj"], saved.quantized["mlp.up_proj"]
    assert first.scheme == second.scheme
    for tensor in ("q", "scale", "zero"):
        assert torch.equal(getattr(first, tensor), getattr(second, tensor))
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


def statistics(seed: int = 0) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    groups = [
        InputStatistics(
            torch.rand(size, generator=generator), torch.rand(size, size, generator=generator), 7, routed
        )
        for size, routed in ((4, None), (6, 3))
    ]
    return LayerStatistics(groups, (torch.rand(1, 3, 4, generator=generator), torch.rand(1, 3, 4)))


def test_statistics_come_back(tmp_path: Path) -> None:
    saved = statistics()
    StatisticsStore(tmp_path / "statistics", "mine").save(2, saved)
    loaded = StatisticsStore(tmp_path / "statistics", "mine").load(2)
    for mine, theirs in zip(loaded.groups, saved.groups, strict=True):
        assert torch.equal(mine.abs_mean, theirs.abs_mean)
        assert torch.equal(mine.moment, theirs.moment)
        assert (mine.num_tokens, mine.routed_tokens) == (theirs.num_tokens, theirs.routed_tokens)
    assert all(torch.equal(*pair) for pair in zip(loaded.probe, saved.probe, strict=True))


def test_statistics_that_are_absent_cut_or_foreign_are_missing(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path, "mine")
    assert store.missing(4) == [0, 1, 2, 3]
    for layer in range(3):
        store.save(layer, statistics(layer))
    assert store.missing(4) == [3]
    path = tmp_path / store.layer_key(1)
    path.write_bytes(path.read_bytes()[:-40])
    assert store.missing(4) == [1, 3]
    assert StatisticsStore(tmp_path, "other").missing(4) == [0, 1, 2, 3]
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_was_cut_short_is_none_of_ours(tmp_path: Path) -> None:
    folder, path = StampedFolder(tmp_path, "work"), tmp_path / "layer.safetensors"
    folder.write(path.name, {"a": torch.zeros(100)})
    assert folder.holds(path.name)
    assert not StampedFolder(tmp_path, "other work").holds(path.name)
    path.write_bytes(path.read_bytes()[:50])
    assert not folder.holds(path.name)


def test_a_file_that_the_system_does_not_open_is_not_taken_for_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise SafetensorError("Error: Too many open files (os error 24)")

    folder = StampedFolder(tmp_path, "work")
    folder.write("layer.safetensors", {"a": torch.zeros(100)})
    monkeypatch.setattr("workers.child.layer_files.safe_open", refused)
    with pytest.raises(SafetensorError, match="Too many open files"):
        folder.holds("layer.safetensors")
