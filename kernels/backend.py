"""Which backend computes: chosen once per problem, out loud; asking for one that can't is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu.aten import AtenBackend
from kernels.cpu.native import NativeBackend
from kernels.cpu.vector_backend import VectorBackend
from kernels.cuda.backend import CudaBackend
from kernels.product import LinearProduct
from kernels.torch_backend import TorchBackend
from kernels.triton_backend.backend import TritonBackend
from kernels.weight import PackedWeight

AUTO = "auto"


class Kernel(Protocol):
    """A weight in a backend's own layout, on its device."""

    @property
    def packed_bytes(self) -> int:
        """Bytes that the weight takes there."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in_features) to (..., out_features), in the dtype that it was prepared for."""


class Backend(Protocol):
    """One way to compute. Its constructor does nothing: what it needs is looked for by `can_implement`."""

    @property
    def name(self) -> str: ...

    def can_implement(self, problem: LinearProduct) -> str | None:
        """Why it can't, or None."""

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> Kernel:
        """Repack a weight for a problem that `can_implement` accepts."""


@dataclass(frozen=True)
class Selection:
    """A backend, why it was chosen, and why those before it were not."""

    backend: Backend
    reason: str
    refusals: tuple[tuple[str, str], ...]  # (name, why not), in the order of preference

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.refusals)
        return f"{self.backend.name} ({self.reason}{refused})"


# The best first. On every device PyTorch's own operators are the last resort.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "cpu": (
        NativeBackend(),
        VectorBackend(),
        AtenBackend(),
        TorchBackend(),
    ),
    "cuda": (CudaBackend(), TritonBackend(), TorchBackend()),
}


def backends_of(device_type: str, requested: str = AUTO) -> tuple[Backend, ...]:
    """The backends that may compute on a device, the best first; only the one of that name if it is given.

    Raises ValueError for a name that the device has no backend of.
    """
    candidates = BACKENDS.get(device_type, (TorchBackend(),))
    selected = tuple(backend for backend in candidates if requested in (AUTO, backend.name))
    if not selected:
        names = ", ".join([AUTO, *(backend.name for backend in candidates)])
        raise ValueError(f"there is no kernel backend {requested!r} for {device_type}; available: {names}")
    return selected


def select_backend(problem: LinearProduct, requested: str = AUTO) -> Selection:
    """The first backend that can compute `problem`, or the one of the name `requested`.

    Raises ValueError if the one that is asked for is unknown or can't.
    """
    refusals: list[tuple[str, str]] = []
    for backend in backends_of(problem.device_type, requested):
        why = backend.can_implement(problem)
        if why is None:
            reason = "the best of those that can" if requested == AUTO else "asked for"
            return Selection(backend, reason, tuple(refusals))
        refusals.append((backend.name, why))
    raise ValueError(f"kernel backend {requested!r} can't compute {problem}: {refusals[-1][1]}")
