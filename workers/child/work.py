"""The inputs of a run: a checked model, tokenized texts, and folders for its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.core.child.assignment import CHECKPOINTS, Assignment, Checkpointed
from app.core.errors import JobFault, ModelRefused, OutOfMemory
from app.core.planning.cost_model import answers_bytes
from app.core.planning.device_profile import DeviceKind
from app.core.planning.large_layers import layers_by_expert
from app.core.planning.plan import CandidatePlan, Plan, plan_job
from app.core.records.specs import JobSpec, Recipe
from workers.child.layer_files import LayerCheckpoints, StatisticsStore
from workers.child.own_answers import KEY, AnswerSampling, AnswersFile, own_answers, prompt_ids
from workers.child.stage_clock import StageClock
from workers.devices.device_memory import device_memory
from workers.devices.selection import select_device
from workers.discovery.family_file import traced_family
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder, text_config
from workers.modeling.experts import show_all_tokens
from workers.modeling.layer_weights import Weights, changed
from workers.modeling.side_files import write_side_files
from workers.modeling.soundness import refuse_broken_weights, refuse_foreign_tokens, refuse_misfits, some
from workers.texts.chat_template import chat_template
from workers.texts.windows import Windows, calibration_windows, evaluation_windows, load_tokenizer

if TYPE_CHECKING:  # an extra of the installation
    from workers.child.lm_eval_tasks import LmEvalTasks

BATCH_TOKENS = 8192
TOKENIZER, STATISTICS = "tokenizer", "statistics"  # folders of the work folder


@dataclass(frozen=True)
class Work:
    """One assignment with its model opened, its plan made and its device selected."""

    assignment: Assignment
    checkpoint: Checkpoint
    plan: Plan
    device: torch.device
    compute_dtype: torch.dtype

    @classmethod
    def open(cls, assignment: Assignment) -> Work:
        """Raises ModelRefused or RecipeUnsupported for what can't be planned, DeviceFault for the device."""
        device = select_device(assignment.device)
        checkpoint = Checkpoint.original(assignment.model_folder, assignment.adapter_folder)
        plan = plan_job(assignment.spec, checkpoint.config, checkpoint.tensors)
        if plan.architecture.to_find is not None:
            family = traced_family(assignment.work_folder, checkpoint.config)
            plan = plan_job(assignment.spec, checkpoint.config, checkpoint.tensors, family)
        checkpoint = checkpoint.with_experts(plan.architecture.stored_layers, plan.architecture.kinds)
        compute_dtype = torch.float32 if device.type == "cpu" else getattr(torch, plan.dtype)
        return cls(assignment, checkpoint, plan, device, compute_dtype)

    @property
    def spec(self) -> JobSpec:
        return self.assignment.spec

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the checkpoint's weights."""
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        return dtype

    @property
    def device_kind(self) -> DeviceKind:
        return "cuda" if self.device.type == "cuda" else "cpu"

    @cached_property
    def by_expert(self) -> frozenset[int]:
        """The layers of which one expert's weights at a time are in memory."""
        return layers_by_expert(self.plan, self.device_kind)

    def decoder(self) -> Decoder:
        """The model, without a layer's weights."""
        decoder = Decoder(self.checkpoint, self.plan.architecture, self.device, self.compute_dtype)
        decoder.by_expert, decoder.scratch = self.by_expert, self.assignment.work_folder
        if self.spec.calibration.all_experts:
            show_all_tokens(decoder.model)
        return decoder

    @property
    def side_folder(self) -> Path:
        """Files beside the weights, as they lie beside the artifact: no stray file, no code of the model."""
        return self.assignment.work_folder / TOKENIZER

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's. Raises TextRefused if it can't be loaded."""
        write_side_files(self.checkpoint, self.side_folder, self.checkpoint.config)
        return load_tokenizer(self.side_folder)

    def batches(self, windows: Windows) -> list[Tensor]:
        return windows.batches(max(1, BATCH_TOKENS // windows.tokens.shape[1]))

    def full_precision(self, weights: Weights) -> Weights:
        """A layer's weights as float32 on the device, where they are searched."""
        return changed(weights, lambda _, value: value.to(self.device, torch.float32))

    def candidate(self, recipe: Recipe, index: int) -> CandidatePlan:
        """A further recipe as a candidate. Raises RecipeUnsupported if the model can't hold it."""
        spec = self.spec.model_copy(update={"recipe": recipe})
        plan = plan_job(spec, self.checkpoint.config, self.checkpoint.tensors, self.plan.architecture)
        return plan.candidates[0].model_copy(update={"recipe_index": index})

    def checkpoints(self, clock: StageClock, recipes: Sequence[Recipe] = ()) -> LayerCheckpoints:
        """Where layers that are solved for these recipes go; by default for those of the job."""
        identity = self.assignment.layers_identity(recipes or self.spec.recipes)
        return LayerCheckpoints(self.assignment.work_folder / CHECKPOINTS, identity, clock.send)

    def statistics(self) -> StatisticsStore:
        return StatisticsStore(
            self.assignment.work_folder / STATISTICS, self.assignment.layers_identity(recipes=())
        )


class JobTexts(NamedTuple):
    """The texts that a job calibrates and evaluates on, and a note on the chat template."""

    calibration: Windows
    evaluation: Windows
    note: str | None
    tasks: LmEvalTasks | None = None


def read_texts(work: Work) -> JobTexts:
    """Raises TextRefused, and ModelRefused for a tokenizer of another model."""
    assignment, spec = work.assignment, work.spec
    tokenizer = work.tokenizer()
    if spec.calibration.is_own_answers:  # written before, by `write_answers`
        calibration = AnswersFile.of(assignment).load()
    else:
        calibration = calibration_windows(spec.calibration, tokenizer, assignment.calibration_file)
    evaluation = evaluation_windows(
        spec.judged_on, spec.evaluation_length, tokenizer, assignment.evaluation_file
    )
    ids = torch.cat([calibration.tokens.flatten(), evaluation.tokens.flatten()])
    refuse_foreign_tokens(ids, work.plan.vocab_size)
    return JobTexts(calibration, evaluation, template_note(tokenizer), open_tasks(work, tokenizer))


def write_answers(work: Work, clock: StageClock) -> None:
    """Have the model write its calibration text, unless an earlier attempt has done so.

    Raises ModelRefused or TextRefused for a model that can't, OutOfMemory for one that has no room here.
    """
    answers, spec = AnswersFile.of(work.assignment), work.spec.calibration
    if not answers.exists:
        require_memory(work)
        tokenizer = work.tokenizer()
        asked = prompt_ids(spec, tokenizer)
        refuse_foreign_tokens(torch.tensor([max(map(max, asked))]), work.plan.vocab_size)
        # No expert is shown more than it is sent: `decoder()` may do so.
        decoder = Decoder(work.checkpoint, work.plan.architecture, work.device, work.compute_dtype)
        sampling = AnswerSampling.of(work.side_folder, tokenizer)
        answers.save(own_answers(decoder, asked, spec, sampling, tokenizer.eos_token_id))
        clock.send(Checkpointed(key=KEY))
    way = "as plain text" if spec.chat_template == "never" else "by its chat template, if it has one"
    clock.note("text", f"the calibration text is the model's own answers to bundled prompts, given {way}")


def require_memory(work: Work) -> None:
    """Raises OutOfMemory if the device has no room for the whole model and the cache of its answers."""
    needed = answers_bytes(work.plan, work.spec, work.device_kind)
    memory = device_memory(str(work.device))
    if memory.total is None or memory.used is None or needed <= memory.total - memory.used:
        return
    raise OutOfMemory(
        f"the model's own answers need {needed / 1e9:.1f} GB, as the whole model is held while it writes "
        f"them; {(memory.total - memory.used) / 1e9:.1f} GB are free",
        code="out_of_memory", param="calibration.dataset",
        remedy="name another calibration.dataset: the job then needs little more than a layer",
    )  # fmt: skip


def open_tasks(work: Work, tokenizer: PreTrainedTokenizerBase) -> LmEvalTasks | None:
    """The tasks of the evaluation, read; None if there are none.

    Raises TextRefused for what lm-eval can't read or a stream can't answer, JobFault without lm-eval.
    """
    spec = work.spec.judged_on
    if not spec.tasks:
        return None
    if find_spec("lm_eval") is None:
        raise JobFault(
            "tasks are scored by lm-eval, which is not installed where the job runs", code="lm_eval_missing",
            remedy="pip install 'nibble[tasks]' on the worker, or leave evaluation.tasks out",
        )  # fmt: skip
    from workers.child.lm_eval_tasks import LmEvalTasks

    tasks = LmEvalTasks.open(spec.tasks, spec.task_limit, tokenizer, text_config(work.checkpoint.config))
    tokens = [token for request in tasks.requests for token in (*request.context, *request.tokens)]
    refuse_foreign_tokens(torch.tensor(tokens), work.plan.vocab_size)
    return tasks


def template_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note on an invalid chat template, which a job without conversations does not need."""
    try:
        chat_template(tokenizer)
    except ModelRefused as refusal:
        return f"{refusal.message}; the server of this model refuses chats, and completes texts"
    return None


def with_checked_shapes(work: Work, clock: StageClock) -> Work:
    """The same work, which knows the tensors that its model does not use.

    Raises ModelRefused if the weights are not those of the config.
    """
    unused = refuse_misfits(work.decoder())
    if unused:
        clock.note(
            "unused_tensors",
            "no part of the language model, copied as they are and not loaded by Nibble's server: "
            + some(unused),
        )
    return replace(work, checkpoint=work.checkpoint.without(unused))


def check_weights(work: Work) -> None:
    """Refuse weights that would else be refused layers later. Raises ModelRefused.

    A GPU comes to the last layer about as soon as its weights can be read twice.
    """
    if work.device.type == "cpu":
        refuse_broken_weights(work.checkpoint)
