"""The choice of a backend is explicit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import backend
from kernels.backend import Backend, backends_of, select_backend
from kernels.product import LinearProduct
from kernels.torch_backend import TorchBackend

PROBLEM = LinearProduct(4, 128, 256, 64, asymmetric=True, dtype=torch.bfloat16, device_type="cpu")


class Refusing(TorchBackend):
    name = "refusing"

    def can_implement(self, problem: LinearProduct) -> str | None:
        return f"not {problem.bits} bits"


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> tuple[Backend, ...]:
    found: tuple[Backend, ...] = (Refusing(), TorchBackend())
    monkeypatch.setitem(backend.BACKENDS, "cpu", found)
    return found


def test_the_first_that_can_is_chosen_and_refusals_are_told(two_backends: tuple[Backend, ...]) -> None:
    selection = select_backend(PROBLEM)
    assert selection.backend is two_backends[1]
    assert selection.refusals == (("refusing", "not 4 bits"),)
    assert str(selection) == "torch (the best of those that can; not refusing: not 4 bits)"


@pytest.mark.usefixtures("two_backends")
def test_a_forced_backend_is_used_or_fails() -> None:
    assert str(select_backend(PROBLEM, "torch")) == "torch (asked for)"
    with pytest.raises(ValueError, match=r"'refusing' can't compute LinearProduct\(bits=4, .*: not 4 bits"):
        select_backend(PROBLEM, "refusing")


@pytest.mark.usefixtures("two_backends")
def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no kernel backend 'cuda' for cpu; available: auto, refusing, to"):
        select_backend(PROBLEM, "cuda")


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
def test_the_last_resort_of_every_device_is_torch(device_type: str) -> None:
    assert backends_of(device_type)[-1].name == "torch"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 6}, ValueError, "bits=6"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"in_features": 100}, ValueError, "in_features=100"),
        ({"in_features": 0, "group_size": -1}, ValueError, "in_features=0"),
        ({"out_features": 0}, ValueError, "out_features=0"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_impossible_problems_are_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(PROBLEM, **change)  # type: ignore[arg-type]
