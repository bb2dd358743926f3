"""Calibration text that the model itself writes: its answers to bundled prompts, sampled as it is served.

The whole model is held for it, with a cache of keys and values. Streamed, every token of an answer would
read every layer from disk again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.core.child.assignment import CHECKPOINTS, Assignment
from app.core.deployments.chat_sampling import MODERATE, chat_sampling
from app.core.errors import ModelRefused, NotFound, TextRefused
from app.core.records.specs import CalibrationSpec
from app.core.sources.text_shapes import Document
from kernels.cpu.float_products import usual_products
from workers.child.layer_files import StampedFolder
from workers.modeling.decoder import Decoder
from workers.serving.generation_settings import end_tokens, read_settings
from workers.texts.chat_template import RefusedByTemplate
from workers.texts.windows import Windows, cut_windows, drawn_windows, needed_template, refused_by_template

ROWS = 32  # answers that are written together
ANSWER_TOKENS = 256  # of one answer, at most
SHORTEST = 32  # tokens of a prompt with its answer, their mean: a model that writes less is given up
KEY = "own-answers.safetensors"


class AnswersFile(StampedFolder):
    """A job's answers among its checkpoints, so that whoever goes on with it reads the same text."""

    @classmethod
    def of(cls, assignment: Assignment) -> Self:
        return cls(assignment.work_folder / CHECKPOINTS, assignment.layers_identity(recipes=()))

    @property
    def exists(self) -> bool:
        return self.holds(KEY)

    def save(self, windows: Windows) -> None:
        self.write(KEY, {"tokens": windows.tokens}, str(windows.available))

    def load(self) -> Windows:
        tensors, available = self.read(KEY)
        return Windows(tensors["tokens"], int(available))


@dataclass(frozen=True)
class AnswerSampling:
    """How answers are drawn: the model's own settings, and the tokens that end one."""

    parameters: dict[str, float]
    ends: frozenset[int]

    @classmethod
    def of(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> AnswerSampling:
        """By the files beside the model's weights. Raises ModelRefused for settings that can't be read."""

        def read(name: str) -> bytes:
            if not (folder / name).exists():
                raise NotFound(f"there is no {name}")
            return (folder / name).read_bytes()

        parameters = {"top_k": 0, **chat_sampling(read).parameters}
        parameters["temperature"] = parameters.get("temperature") or MODERATE["temperature"]
        return cls(parameters, end_tokens(read_settings(folder), tokenizer))

    def config(self, tokens: int) -> GenerationConfig:
        """For answers of at most `tokens`."""
        ends = sorted(self.ends)
        return GenerationConfig(
            do_sample=True, max_new_tokens=tokens, eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0, **self.parameters,
        )  # fmt: skip


def prompts() -> list[str]:
    """The bundled ones."""
    return files("workers.texts").joinpath("builtin", "self", "prompts.txt").read_text("utf-8").splitlines()


def prompt_ids(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each prompt: by the model's chat template, if there is one and it is to be used.

    Raises TextRefused for a template that is missing or refuses a prompt, ModelRefused for one that is none.
    """
    if spec.chat_template == "never" or (spec.chat_template == "auto" and tokenizer.chat_template is None):
        return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts()]
    template = needed_template(spec, tokenizer, [Document(messages=[])])
    assert template is not None
    try:
        rendered = [
            template.render([{"role": "user", "content": prompt}], {"add_generation_prompt": True})
            for prompt in prompts()
        ]
    except RefusedByTemplate as refusal:
        raise refused_by_template(refusal) from refusal
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered]


def own_answers(
    decoder: Decoder,
    asked: Sequence[list[int]],
    spec: CalibrationSpec,
    sampling: AnswerSampling,
    separator: int | None,
) -> Windows:
    """The windows of `spec` from prompts and answers, `separator` between two; the same for the same seed.

    Raises TextRefused for a model whose answers are too short, ModelRefused for one that can't write any.
    """
    needed = spec.num_samples * spec.sequence_length
    ids: list[int] = []
    settings = sampling.config(min(ANSWER_TOKENS, -(-needed // ROWS)))
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    with whole_model(decoder) as model, torch.random.fork_rng(devices):
        torch.manual_seed(spec.seed)
        for first in range(0, -(-needed // SHORTEST), ROWS):
            rows = [asked[number % len(asked)] for number in range(first, first + ROWS)]
            for text in answered(model, rows, settings, sampling.ends):
                if ids and separator not in (None, ids[-1]):
                    ids.append(separator)
                ids += text
            if len(ids) >= needed:
                break
    if len(ids) < needed:
        raise TextRefused(
            f"the model's own answers are short: {first + ROWS} with their prompts have {len(ids)} tokens, "
            f"{needed} are needed",
            code="text_too_short", param="calibration.dataset",
            remedy="lower calibration.num_samples or sequence_length, or name another dataset",
        )  # fmt: skip
    return drawn_windows(spec, cut_windows(spec, ids, spec.sequence_length))


@contextmanager
def whole_model(decoder: Decoder) -> Iterator[PreTrainedModel]:
    """The decoder's model with all weights that text reaches."""
    head = decoder.architecture.head
    module = decoder.model.get_submodule(head)
    with ExitStack() as stack:
        stack.enter_context(usual_products())
        stack.enter_context(decoder.loaded(decoder.around, decoder.around_path, decoder.outside()))
        stack.enter_context(decoder.loaded_when_called())
        stack.enter_context(decoder.loaded(module, f"{head}.", list(module.state_dict())))
        for index in range(decoder.num_layers):
            stack.enter_context(decoder.layer(index, decoder.layer_weights(index)))
        yield decoder.model


@torch.no_grad()
def answered(
    model: PreTrainedModel, rows: Sequence[list[int]], settings: GenerationConfig, ends: frozenset[int]
) -> list[list[int]]:
    """Each row of token ids with the answer behind it, which ends with the first end token."""
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    try:
        written: Tensor = model.generate(
            tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # models are code of transformers, which raises what it likes
        raise ModelRefused(
            f"{type(model).__name__} can't write answers: {type(fault).__name__}: {fault}",
            code="answers_unsupported", remedy="name another calibration.dataset, or leave it out",
            param="calibration.dataset",
        ) from fault  # fmt: skip
    answers = written[:, length:].tolist()
    return [row + until(answer, ends) for row, answer in zip(rows, answers, strict=True)]


def until(answer: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to the first that ends an answer."""
    return answer[: next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))]
