"""How a step of given sizes runs: launch by launch, or replayed from what was captured once.

A step takes no arguments: it reads and writes tensors that stay where they are (`slot_cache`). Whoever runs
it may therefore record it at its first call and repeat the record from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Sizes = tuple[int, int]  # rows and columns


class StepInfo(Protocol):
    """What a runner needs to know of the steps."""

    def step(self) -> Tensor:
        """Run one, of the sizes that were selected: float32 logits (rows, vocabulary)."""

    def static_tensors(self) -> list[Tensor]:
        """What it may read or write beside the model's weights, seen in the sizes that were selected."""

    def run_twice(self) -> AbstractContextManager[None]:
        """Within it a step may run that will run again."""


class StepRunner(Protocol):
    """Runs steps."""

    note: str  # why steps run launch by launch, or empty

    def __call__(self, steps: StepInfo, sizes: Sizes) -> Tensor:
        """Logits of the step; the next call may overwrite them."""


class EagerSteps:
    """Launch by launch."""

    def __init__(self, note: str = "") -> None:
        self.note = note

    def __call__(self, steps: StepInfo, sizes: Sizes) -> Tensor:
        return steps.step()


class GraphSteps:
    """A CUDA graph for each pair of sizes, captured at its first step; all share their memory.

    Where a step can't be captured, all run launch by launch from then on, and `note` says why.
    """

    def __init__(self) -> None:
        self.note = ""
        self._graphs: dict[Sizes, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory: Any = None

    def __call__(self, steps: StepInfo, sizes: Sizes) -> Tensor:
        if self.note:
            return steps.step()
        captured = self._graphs.get(sizes)
        if captured is None:
            try:
                captured = self._graphs[sizes] = self._capture(steps)
            except RuntimeError as fault:  # of CUDA, and of what asks for values on the host
                self.note = f"a step can't be captured: {str(fault).splitlines()[0]}"
                log.warning("no CUDA graphs: %s", self.note)
                return steps.step()
        graph, logits = captured
        graph.replay()
        return logits

    def _capture(self, steps: StepInfo) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Libraries and kernels are loaded by a first run, which a capture could not do.
        warm = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm), steps.run_twice():
            steps.step()
        torch.cuda.current_stream().wait_stream(warm)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = steps.step()
        return graph, logits


class TracedSteps:
    """The stand-in for graphs on a CPU: traces operators at a step's first run and repeats them.

    All that Python decided is frozen as in a graph, and asking for a value on the host fails, too.
    """

    def __init__(self) -> None:
        self.note = ""
        self.traces: dict[Sizes, Callable[..., Tensor]] = {}

    def __call__(self, steps: StepInfo, sizes: Sizes) -> Tensor:
        from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports, for tests alone

        tensors = steps.static_tensors()
        if sizes not in self.traces:
            with steps.run_twice():
                self.traces[sizes] = make_fx(lambda *_tensors: steps.step())(*tensors)
        return self.traces[sizes](*tensors)
