"""A batch whose steps can be replayed: rows lie in slots, and a step has one of a few sizes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.core.errors import ModelRefused
from workers.modeling.experts import SplitExperts
from workers.modeling.quantized_linear import QuantizedLinear
from workers.serving.batch import Batch, Prefill
from workers.serving.requests import Sequence
from workers.serving.row_cache import prompt_cache
from workers.serving.sampling import Drawn, draw_ahead
from workers.serving.slot_cache import SlotCache, SlotLimits
from workers.serving.steps import EagerSteps, GraphSteps, StepRunner, TracedSteps

RUNNERS: dict[str, type[EagerSteps | GraphSteps | TracedSteps]] = {
    "eager": EagerSteps, "graphs": GraphSteps, "traced": TracedSteps
}  # fmt: skip
OPERATORS = {"torch", "aten"}  # backends that compute by PyTorch's operators alone


class SlotBatch(Batch):
    """The sequences that run, a slot each. Tokens that the device draws stay there for the next step."""

    cache: SlotCache

    def __init__(self, model: PreTrainedModel, limits: SlotLimits, runner: StepRunner) -> None:
        super().__init__(model, limits.cells)
        self.cache = SlotCache(limits, self.device)
        self.runner = runner
        self._on_device: list[bool] = []  # whether the next step has the row's token already

    def join(self, prefill: Prefill) -> None:
        super().join(prefill)
        self._on_device += [False] * (len(self.sequences) - len(self._on_device))

    def leave(self, row: int) -> Sequence:
        self._on_device[row] = self._on_device[-1]
        self._on_device.pop()
        return super().leave(row)

    def advance(self) -> Tensor:
        rows = len(self.sequences)
        self.cache.reserve(rows, self.cache.window.width)
        pairs = zip(self.sequences, self._on_device, strict=True)
        sizes = self.cache.select([-1 if there else sequence.tokens[-1] for sequence, there in pairs])
        logits = self.runner(self, sizes)[:rows]
        self.cache.advance()
        self._on_device = [False] * rows
        return logits

    def draw_ahead(self, logits: Tensor) -> Drawn | None:
        ahead = draw_ahead(logits, self.sequences)
        if ahead is None:
            return None
        tokens, drawn = ahead
        self.cache.inputs.tokens[: len(tokens)].copy_(tokens)
        self._on_device = [True] * len(tokens)
        return drawn

    def step(self) -> Tensor:
        """The model's own forward pass over the inputs: float32 logits (rows of the step, vocabulary)."""
        inputs = self.cache.inputs
        begin = inputs.begin
        output = self.model(
            input_ids=inputs.tokens[: inputs.rows, None],
            position_ids=(inputs.end - begin)[:, None],
            attention_mask=inputs.mask(begin),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    def static_tensors(self) -> list[Tensor]:
        return self.cache.static_tensors()

    def run_twice(self) -> AbstractContextManager[None]:
        return self.cache.states_put_back()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """A step of each number of rows, before anyone waits for one."""
        prompt = prompt_cache(self.model)
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self._cache_argument: prompt})
        for rows in self.cache.row_sizes:
            if rows > self.cache.room(2):
                break
            while self.cache.window.rows < rows:
                self.cache.join(prompt, tokens.numel())
            self.runner(self, self.cache.select([0] * rows))
        while self.cache.window.rows:
            self.cache.leave(self.cache.window.rows - 1)


def runner_of(model: PreTrainedModel, name: str) -> StepRunner:
    """The runner of that name; launch by launch where a step depends on numbers that the host reads.

    Raises ModelRefused for `traced` with kernels that a trace of operators would miss.
    """
    modules = list(model.modules())
    if any(isinstance(module, SplitExperts) for module in modules):
        return EagerSteps("the host reads which experts have tokens")
    backends = {module.selection.backend.name for module in modules if isinstance(module, QuantizedLinear)}
    if name == "traced" and backends - OPERATORS:
        raise ModelRefused(
            f"--steps traced repeats PyTorch's operators; kernels of {', '.join(sorted(backends))} are none",
            code="steps_unsupported", remedy="add --kernel-backend torch",
        )  # fmt: skip
    return RUNNERS[name]()
