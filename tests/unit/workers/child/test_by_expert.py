"""Layers that are worked on expert by expert: the bytes of layers that are held, the memory of one expert."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.child.assignment import CHECKPOINTS, OUTPUT
from app.core.planning import large_layers
from app.core.records.specs import CalibrationSpec, Recipe, SearchSpec
from tests.tiny_models import EngineRun, random_model, save_model, some_text, tiny_spec
from workers.child.layer_files import StatisticsStore, StoredLinears
from workers.quantization.input_statistics import GroupStatistics, InputStatistics, LayerStatistics

RECIPES = (
    Recipe(group_size=32, search=SearchSpec(grid_points=4)),
    Recipe(method="gptq", group_size=32),
)
GPT_OSS = {"num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention", "full_attention"]}
LLAMA4 = {
    "num_experts_per_tok": 1,
    "head_dim": 16,
    "intermediate_size_mlp": 128,
    "interleave_moe_layer_step": 1,
}
QWEN3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "each expert's matrices, beside a dense layer": ("qwen3_moe", QWEN3, {}),
    "names of their own": ("mixtral", {"num_local_experts": 4}, {}),
    "every token shown to all": ("mixtral", {"num_local_experts": 4}, {"all_experts": True}),
    "fused, interleaved, with biases": ("gpt_oss", {"num_local_experts": 4, **GPT_OSS}, {}),
    "fused, sorted input": ("llama4_text", {"num_local_experts": 4, **LLAMA4}, {}),
}


def files_of(folder: Path) -> dict[str, bytes]:
    output = folder / OUTPUT
    return {
        str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*.safetensors"))
    }


def split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_layers, "EXPERT_BYTES", {"cpu": 0, "cuda": 0})


@pytest.mark.parametrize(("kind", "sizes", "text"), MODELS.values(), ids=MODELS)
def test_files_and_report_are_those_of_layers_that_are_held(
    kind: str, sizes: dict[str, Any], text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(random_model(kind, **sizes), tmp_path / "model")
    calibration = CalibrationSpec(texts=(some_text("valid"),), num_samples=4, sequence_length=32, **text)
    spec = tiny_spec(RECIPES, calibration=calibration)
    whole = EngineRun(spec, model, tmp_path / "whole")
    assert not whole.opened.by_expert
    split(monkeypatch)
    apart = EngineRun(spec, model, tmp_path / "apart")
    assert apart.opened.by_expert == ({1} if "mlp_only_layers" in sizes else {0, 1})
    assert isinstance(apart.checkpoints().load_layer(0, 1).quantized, StoredLinears)
    assert files_of(apart.work) == files_of(whole.work)
    for own, expected in zip(apart.report.candidates, whole.report.candidates, strict=True):
        assert (own.perplexity, own.kl) == (expected.perplexity, expected.kl)
        for layer, other in zip(own.layers, expected.layers, strict=True):
            assert layer.model_copy(update={"seconds": other.seconds}) == other
    assert apart.report.histograms == whole.report.histograms
    assert not list(tmp_path.rglob("tmp*"))  # of the sums on disk nothing is left


def test_a_killed_job_goes_on_behind_layers_of_which_all_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's own file comes last, so one that was broken off is done again; so is one that lost a file."""
    split(monkeypatch)
    sizes: dict[str, Any] = {"num_local_experts": 4, "num_hidden_layers": 3}
    model, work = save_model(random_model("mixtral", **sizes), tmp_path / "model"), tmp_path / "work"
    first = EngineRun(tiny_spec(), model, work)
    expected, checkpoints = files_of(work), work / CHECKPOINTS
    names = {file.name for file in checkpoints.glob("layer-*")}
    assert names == {
        f"layer-{layer:05d}-recipe-00{part}.safetensors" for layer in range(3) for part in ("", "-0000")
    }
    announced = [message.key for message in first.messages if message.kind == "checkpoint"]
    assert announced.index("layer-00001-recipe-00-0000.safetensors") < announced.index(
        "layer-00001-recipe-00.safetensors"
    )
    for missing, resumed_at in (("layer-00001-recipe-00", 1), ("layer-00002-recipe-00-0000", 2)):
        (checkpoints / f"{missing}.safetensors").unlink()
        again = EngineRun(tiny_spec(), model, work)
        assert [note for note in again.report.notes if f"{resumed_at} of 3 layers were finished" in note]
        assert files_of(work) == expected


def test_a_layers_file_that_lost_another_is_not_finished(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path, "mine")
    groups = [
        InputStatistics(torch.rand(8), torch.rand(8, 8), 5, number, abs_max=torch.rand(8))
        for number in range(3)
    ]
    probe = (torch.rand(1, 2, 8), torch.rand(1, 2, 8))
    store.save(0, LayerStatistics(GroupStatistics([partial(groups.__getitem__, n) for n in range(3)]), probe))
    assert store.missing(1) == []
    loaded = store.load(0).to(torch.device("cpu"))
    assert isinstance(loaded.groups, GroupStatistics)
    for one, other in zip(loaded.groups, groups, strict=True):
        assert torch.equal(one.moment, other.moment)
        assert one.abs_max is not None
        assert other.abs_max is not None
        assert torch.equal(one.abs_max, other.abs_max)
        assert (one.num_tokens, one.routed_tokens) == (other.num_tokens, other.routed_tokens)
    (tmp_path / "layer-00000-0000.safetensors").unlink()
    assert store.missing(1) == [0]


MEASURED = """
import sys
from pathlib import Path
from app.core.planning import large_layers
from tests.tiny_models import EngineRun, tiny_spec
from workers.child import layer_files
from workers.quantization import scale_search
large_layers.EXPERT_BYTES = {"cpu": 0}
layer_files.PART_BYTES = scale_search.ERRORS_AT_ONCE["cpu"] = 1 << 20  # few experts do not reach these bounds
for model in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    EngineRun(tiny_spec(), Path(model), Path(model + "-work"), threads=1)
    print(1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]))
"""

# What is freed goes back to the system at once. Else glibc raises its threshold as it likes, and keeps up to
# 0.6 of what held experts would add, if threads meet otherwise on a busy machine.
RETURNED = {
    **os.environ,
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


@pytest.mark.timeout(900)  # two jobs in a process of their own
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """24 more experts of 2.4 MB: of the layers' float32 weights, copies, sums and integers nothing stays."""
    models, inner, hidden = [], 1024, 192
    for experts in (8, 32):
        sizes: dict[str, Any] = {
            "num_local_experts": experts, "hidden_size": hidden, "intermediate_size": inner,
        }  # fmt: skip
        models.append(tmp_path / str(experts))
        save_model(random_model("mixtral", torch.bfloat16, **sizes), models[-1])
    command = [sys.executable, "-c", MEASURED, *map(str, models)]
    done = subprocess.run(command, env=RETURNED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    added = 24 * (3 * inner * hidden + inner * inner) * 4  # bytes of the weights and of the sums
    assert many - few < 0.3 * added, (few / 1e6, many / 1e6)
