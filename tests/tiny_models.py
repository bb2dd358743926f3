"""Tiny random models of every architecture, saved as real model folders; and engine runs on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from app.core.child.assignment import Assignment, Finished, ProgressMessage
from app.core.jobs.report import Report
from app.core.planning.architectures import Architecture, architecture_of
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec
from app.core.sources.fetching import text_digest
from workers.child.job_run import run_job
from workers.child.layer_files import LayerCheckpoints
from workers.child.stage_clock import StageClock
from workers.child.work import JobTexts, Work, read_texts, with_checked_shapes
from workers.discovery.family_discovery import discover
from workers.modeling.checkpoint import Checkpoint

TOKENIZER = Path(__file__).parent.parent / "examples" / "wikitext-llama-6m"
TEXTS = TOKENIZER.parent.parent / "workers" / "texts" / "builtin" / "wikitext2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FIRST_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "cohere", "opt", "gpt_neox",
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **ALTERNATING}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
    "num_key_value_heads": 4,
}  # fmt: skip
OTHER_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {}),
    "phi3 without grouped heads": ("phi3", {"num_key_value_heads": 4}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "opt": ("opt", {"ffn_dim": 128}),
    "opt with gelu": ("opt", {"ffn_dim": 128, "activation_function": "gelu", "word_embed_proj_dim": 32}),
    "gpt-neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "deepseek-v2": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek-v3": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 32, "n_group": 2, "topk_group": 1}),
    "gpt-neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}
SHAPE = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def random_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model whose norms, biases and weights are all random: no tensor is a neutral element."""
    generator = torch.Generator().manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    gemma = model_type.startswith("gemma")  # its norms add one, its embedding is multiplied by sqrt(hidden)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_((0 if gemma else 1) + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.1 * noise)
            elif "embed" in name:
                parameter.copy_(noise / (8 if gemma else 1))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def save_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Path:
    """The folder of a model with its tokenizer and chat template."""
    disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def tiny_model(folder: Path, model_type: str = "llama", **changes: object) -> Path:
    return save_model(random_model(model_type, **changes), folder)  # type: ignore[arg-type]


def fitted_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture as a job has it: groups that are not known are found by tracing."""
    config, tensors = checkpoint.config, checkpoint.tensors
    architecture = architecture_of(config, tensors)
    return (
        architecture if architecture.to_find is None else architecture_of(config, tensors, discover(config))
    )


def plant_outliers(model: PreTrainedModel, factor: float = 16.0) -> None:
    """Every eighth channel of each norm x factor, the columns that read it / factor: the same function."""
    with torch.no_grad():
        for layer in model.get_submodule("model.layers"):
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[::8] *= factor
                for linear in linears:
                    linear.weight[:, ::8] /= factor


def some_text(part: str) -> str:
    """The start of a bundled text: the whole takes seconds to tokenize."""
    return (TEXTS / f"{part}.txt").read_text("utf-8")[:8000]


def tiny_spec(recipe: Recipe | tuple[Recipe, ...] | None = None, **changes: object) -> JobSpec:
    """A job that takes about a second on a tiny model."""
    recipe = recipe or Recipe(group_size=32, search=SearchSpec(grid_points=4))
    body: dict[str, object] = {
        "model": "tiny",
        "recipe": recipe,
        "calibration": CalibrationSpec(texts=(some_text("valid"),), num_samples=4, sequence_length=32),
        "evaluation": EvaluationSpec(texts=(some_text("test"),), num_samples=2),
    }
    return JobSpec.model_validate({**body, **changes})


def assignment(spec: JobSpec, model: Path, work: Path, **changes: object) -> Assignment:
    text = text_digest(spec.calibration, changes.get("calibration_file"), lambda _: None)  # type: ignore[arg-type]
    body = {"spec": spec, "model_folder": model, "model_name": "tiny", "model_digest": "0" * 64}
    return Assignment.model_validate({**body, "calibration_digest": text, "work_folder": work, **changes})


class EngineRun:
    """A job that ran to its end: what it worked on, its messages, its report, its folders."""

    def __init__(self, spec: JobSpec, model: Path, work: Path, **changes: object) -> None:
        self.messages: list[ProgressMessage] = []
        self.work = work
        job = assignment(spec, model, work, **changes)
        self.finished: Finished = run_job(job, self.messages.append)
        unread = Work.open(job)
        self.clock = StageClock(lambda _: None, unread.device, unread.plan.num_layers)
        self.opened = with_checked_shapes(unread, self.clock)

    def texts(self) -> JobTexts:
        return read_texts(self.opened)

    def checkpoints(self) -> LayerCheckpoints:
        return self.opened.checkpoints(self.clock)

    @property
    def report(self) -> Report:
        return Report.model_validate_json((self.work / self.finished.report).read_text())

    def folder(self, format_name: str, recipe_index: int = 0) -> Path:
        return next(
            self.work / output.folder
            for output in self.finished.outputs
            if (output.format, output.recipe_index) == (format_name, recipe_index)
        )


def some_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 4096, (batch, length), generator=torch.Generator().manual_seed(seed))
