"""Experts fused in files are read as matrices: the same numbers, for every way in which they are fused."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture
from app.core.planning.family import Experts, LayerKind, ScaleGroup
from app.core.planning.fused_experts import split_fused_experts
from app.core.records.specs import JobSpec, Recipe
from tests.tiny_models import EngineRun, assignment, random_model, save_model, tiny_spec
from tests.unit.app.core.planning.headers import header
from workers.child.streaming import run_model_free
from workers.discovery.family_discovery import working_model
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.experts import experts_of, split_weights
from workers.serving.loading import LoadRequest, load_model

HIDDEN, INNER, COUNT = 6, 10, 3
LAYERS, STEM = "model.layers", "mlp.experts"
Form = dict[str, Any]
FORMS: list[Form] = [
    {"gate": gate, "transposed": transposed, "interleaved": interleaved, "biased": biased}
    for gate, transposed, interleaved, biased in product(("gate_proj", ""), *[(True, False)] * 3)
    if gate or not interleaved
]


def kind_of(stem: str = STEM, **form: Any) -> LayerKind:
    fused = {"fused_up": f"{STEM}.gate_up_proj", "fused_down": f"{STEM}.down_proj"}
    body = {"module": stem, "gate": "gate_proj", "up": "up_proj", "down": "down_proj", **fused, **form}
    linears = (f"{stem}.{{expert}}.{body['up']}", f"{stem}.{{expert}}.{body['down']}")
    groups = (ScaleGroup(balance_layers=linears),)
    return LayerKind(groups=groups, experts=Experts.model_validate(body))


def parts_of(form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every expert's tensors by name within the experts."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    generator = torch.Generator().manual_seed(1)
    found = {}
    for number, (leaf, shape) in product(range(COUNT), shapes.items()):
        if leaf != "gate_proj" or form["gate"]:
            found[f"{number}.{leaf}.weight"] = torch.randn(shape, generator=generator).to(dtype)
            if form["biased"]:
                found[f"{number}.{leaf}.bias"] = torch.randn(shape[:1], generator=generator).to(dtype)
    return found


def fused(parts: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    def stacked(leaves: list[str], kind: str) -> Tensor:
        experts = []
        for number in range(COUNT):
            values = [parts[f"{number}.{leaf}.{kind}"] for leaf in leaves]
            rows = torch.stack(values, 1).flatten(0, 1) if form["interleaved"] else torch.cat(values)
            experts.append(rows.T if form["transposed"] and kind == "weight" else rows)
        return torch.stack(experts).contiguous()

    outer = ["gate_proj", "up_proj"] if form["gate"] else ["up_proj"]
    names = {f"{STEM}.gate_up_proj": outer, f"{STEM}.down_proj": ["down_proj"]}
    found = {name: stacked(leaves, "weight") for name, leaves in names.items()}
    if form["biased"]:
        found |= {f"{name}_bias": stacked(leaves, "bias") for name, leaves in names.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(key for key, on in form.items() if on))
def test_every_form_is_read_as_the_matrices_that_were_fused(
    tmp_path: Path, form: Form, dtype: torch.dtype
) -> None:
    parts, other = parts_of(form, dtype), torch.randn(4, 4)
    layers = {f"{LAYERS}.{n}.{name}": value for n in (1, 11) for name, value in fused(parts, form).items()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.norm": other, **layers}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path).with_experts(LAYERS, [kind_of(**form)])
    expected = {f"{LAYERS}.{n}.{STEM}.{name}": value for n in (1, 11) for name, value in parts.items()}
    assert checkpoint.tensors.keys() == expected.keys() | {"model.norm"}
    for name, value in {**expected, "model.norm": other}.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.tensors[name].size == value.nbytes
        assert torch.equal(torch.cat([chunk.clone() for chunk in checkpoint.chunks(name)]), value.flatten())
        assert b"".join(checkpoint.raw_bytes(name)) == value.flatten().view(torch.uint8).numpy().tobytes()


def test_experts_that_keep_their_precision_stay_as_they_lie(tmp_path: Path) -> None:
    """One tensor each way; where a linear of one expert is quantized, a matrix for each."""
    for form in FORMS:
        stored = {
            f"{LAYERS}.{n}.{k}": v
            for n in (0, 1)
            for k, v in fused(parts_of(form, torch.float32), form).items()
        }
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file(stored, tmp_path / "model.safetensors")
        split = Checkpoint(tmp_path).with_experts(LAYERS, [kind_of(**form)])
        first = {f"{LAYERS}.0.{STEM}.{name}" for name in ("1.up_proj", "2.down_proj")}
        mixed = split.with_whole_experts(first)
        apart = {name for name in split.tensors if name.startswith(f"{LAYERS}.0.")}
        assert mixed.tensors.keys() == apart | {name for name in stored if name.startswith(f"{LAYERS}.1.")}
        whole = split.with_whole_experts({"lm_head"})
        assert whole.tensors.keys() == stored.keys()
        for name, value in stored.items():
            assert torch.equal(whole.tensor(name), value)
            assert split.header(name) == whole.tensors[name]


def test_only_what_lies_around_an_expert_is_read_for_it(tmp_path: Path) -> None:
    """A matrix whose rows lie together costs its own bytes, another the bytes of its expert."""
    for form in FORMS:
        file = {
            f"{LAYERS}.0.{name}": header(tuple(value.shape), "F32")
            for name, value in fused(parts_of(form, torch.float32), form).items()
        }
        expert = 4 * HIDDEN * INNER * (2 if form["gate"] else 1)
        for name, view in split_fused_experts(file, LAYERS, [kind_of(**form)]).items():
            span = view.end - view.start
            assert view.size <= span <= expert, name
            assert view.strides or span == view.size, name


@pytest.mark.parametrize(
    ("model_type", "form", "changes"),
    [
        (
            "gpt_oss",
            {"transposed": True, "interleaved": True, "biased": True},
            {"num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention"] * 2},
        ),
        (
            "granitemoe",
            {
                "stem": "block_sparse_moe.experts",
                "fused_up": "block_sparse_moe.input_linear.weight",
                "fused_down": "block_sparse_moe.output_linear.weight",
            },
            {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    ],
)
def test_files_of_transformers_hold_the_experts_of_its_modules(
    tmp_path: Path, model_type: str, form: Form, changes: Form
) -> None:
    model = random_model(model_type, **changes)
    save_model(model, tmp_path)
    kind = kind_of(**form)
    checkpoint = Checkpoint(tmp_path).with_experts(LAYERS, [kind])
    assert kind.experts is not None
    for number in range(2):
        module: nn.Module = model.get_submodule(f"{LAYERS}.{number}.{kind.experts.module}")
        found = experts_of(module)
        assert found is not None
        for name, value in split_weights(module, found, kind.experts):
            assert torch.equal(checkpoint.tensor(f"{LAYERS}.{number}.{kind.experts.module}.{name}"), value)


def test_names_of_transformers_count_where_the_family_stores_a_matrix_for_each_expert() -> None:
    """As hub files of Qwen3.5 MoE are, which transformers itself writes with one matrix for each expert."""
    for gate, first in (("gate_proj", "gate_up_proj"), ("", "up_proj")):
        file = {
            f"{LAYERS}.0.{STEM}.{first}": header((COUNT, (2 if gate else 1) * INNER, HIDDEN)),
            f"{LAYERS}.0.{STEM}.down_proj": header((COUNT, HIDDEN, INNER)),
        }
        split = split_fused_experts(file, LAYERS, [kind_of(gate=gate, fused_up="", fused_down="")])
        leaves = [leaf for leaf in (gate, "up_proj", "down_proj") if leaf]
        assert {*split} == {
            f"{LAYERS}.0.{STEM}.{n}.{leaf}.weight" for n, leaf in product(range(COUNT), leaves)
        }
        assert all(view.end - view.start == view.size for view in split.values())


def test_the_shapes_tell_whether_gated_experts_lie_transposed(tmp_path: Path) -> None:
    """Files of one family have either, and transformers takes both."""
    for lie in (True, False):
        form: Form = {
            "gate": "gate_proj", "transposed": lie, "interleaved": False, "biased": False,
        }  # fmt: skip
        tensors = fused(parts_of(form, torch.float32), form)
        file = {f"{LAYERS}.0.{name}": header(tuple(value.shape), "F32") for name, value in tensors.items()}
        expected = split_fused_experts(file, LAYERS, [kind_of(**form)])
        assert split_fused_experts(file, LAYERS, [kind_of(**form | {"transposed": not lie})]) == expected


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gate_up_proj": (3, 20, 7)}, "does not fit"),
        ({"gate_up_proj": (2, 20, 6)}, "does not fit"),
        ({"gate_up_proj": (20, 6)}, "does not fit"),
        ({"down_proj": None}, "down_proj is missing"),
        ({"gate_up_proj": (4097, 20, 6), "down_proj": (4097, 6, 10)}, "4097 experts"),
    ],
)
def test_fused_tensors_that_contradict_each_other_are_refused(
    changes: dict[str, tuple[int, ...] | None], why: str
) -> None:
    shapes: dict[str, tuple[int, ...] | None] = {
        "gate_up_proj": (3, 20, 6),
        "down_proj": (3, 6, 10),
        **changes,
    }
    file = {f"{LAYERS}.0.{STEM}.{name}": header(shape) for name, shape in shapes.items() if shape}
    with pytest.raises(ModelRefused, match=why) as refused:
        split_fused_experts(file, LAYERS, [kind_of()])
    assert refused.value.code == "weights_mismatch"


def test_files_with_a_matrix_for_each_expert_stay_as_they_are() -> None:
    file = {f"{LAYERS}.0.{STEM}.0.{name}.weight": header((4, 4)) for name in ("gate_proj", "down_proj")}
    outside = {"mtp.layers.0.mlp.experts.gate_up_proj": header((3, 20, 6))}
    assert split_fused_experts({**file, **outside}, LAYERS, [kind_of(), LayerKind(groups=())]) == {
        **file,
        **outside,
    }


def test_a_model_with_fused_experts_is_planned_and_quantized_as_with_a_matrix_for_each(
    tmp_path: Path,
) -> None:
    """The file as transformers writes it, and with both forms of fused tensors in two layers."""
    model = random_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_hidden_layers=2
    )
    plain = save_model(model, tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    assert f"{LAYERS}.0.{STEM}.3.up_proj.weight" in tensors
    fused_file = {name: value for name, value in tensors.items() if ".experts." not in name}
    for number, transposed in ((0, False), (1, True)):
        for name, value in model.get_submodule(f"{LAYERS}.{number}.{STEM}").named_parameters():
            stored = value.detach().transpose(1, 2) if transposed else value.detach()
            fused_file[f"{LAYERS}.{number}.{STEM}.{name}"] = stored.contiguous()
    shutil.copytree(plain, tmp_path / "fused")
    save_file(fused_file, tmp_path / "fused" / "model.safetensors")
    runs = [EngineRun(tiny_spec(), tmp_path / name, tmp_path / f"work-{name}") for name in ("plain", "fused")]
    first, second = (
        [load_file(f) for f in run.folder("compressed-tensors").glob("*.safetensors")] for run in runs
    )
    assert len(first) == len(second) == 1
    assert first[0].keys() == second[0].keys()
    assert f"{LAYERS}.1.{STEM}.3.up_proj.weight_packed" in second[0]
    for name, value in first[0].items():
        assert torch.equal(second[0][name], value), name


@pytest.mark.parametrize("method", ["awq", "rtn without an evaluation"])
def test_experts_of_a_job_that_ignores_them_keep_their_tensor(tmp_path: Path, method: str) -> None:
    """Byte for byte, and Nibble's server reads it."""
    source = save_model(working_model({"model_type": "mistral4"})[0], tmp_path / "model")
    recipe = Recipe(method=method.split()[0], group_size=32, ignore=("lm_head", r"re:.*\.experts\..*"))
    if method == "awq":
        folder = EngineRun(tiny_spec(recipe), source, tmp_path / "work").folder("compressed-tensors")
    else:
        spec = JobSpec(model="any", recipe=recipe, evaluation=None)
        (tmp_path / "work").mkdir()
        done = run_model_free(assignment(spec, source, tmp_path / "work"), lambda _message: None)
        folder = tmp_path / "work" / done.outputs[0].folder
    before, after = (load_file(each / "model.safetensors") for each in (source, folder))
    experts = {name for name in before if ".experts." in name}
    assert {name.rpartition(".")[2] for name in experts} == {"gate_up_proj", "down_proj"}
    assert {name for name in after if ".experts." in name} == experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
    loaded = load_model(LoadRequest(folder, torch.device("cpu"), torch.float32)).model
    assert torch.isfinite(loaded(input_ids=torch.arange(8)[None]).logits).all()


def test_a_module_that_checkpoints_name_longer_is_found_by_its_own_name() -> None:
    """As the router of Granite, whose groups observe it by the name in the files."""
    pairs = (("block_sparse_moe.router.", "block_sparse_moe.router.layer."),)
    granite = Architecture(model_type="g", class_name="G", stored_layers=LAYERS, stored_names=pairs)
    assert granite.module_name("block_sparse_moe.router.layer") == "block_sparse_moe.router"
    assert granite.module_name("block_sparse_moe.router.layer.norm") == "block_sparse_moe.router.norm"
    assert granite.module_name("block_sparse_moe.router.layers") == "block_sparse_moe.router.layers"
