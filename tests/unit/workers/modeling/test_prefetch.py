"""Weights read ahead: the same weights, in the same order, never more than one step ahead."""

from __future__ import annotations

import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_models import fitted_architecture, some_tokens, tiny_model
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.modeling.prefetch import Read, WeightPrefetch
from workers.quantization import evaluation

CPU = torch.device("cpu")


class Shelf:
    """Counts what was read, and by which thread."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[str] = set()

    def read(self, number: int) -> dict[str, Tensor]:
        self.numbers.append(number)
        self.threads.add(threading.current_thread().name)
        if number == 3:
            raise OSError("the disk is gone")
        return {"weight": torch.full((2,), number)}

    def reads(self, count: int) -> list[Read]:
        return [partial(self.read, number) for number in range(count)]


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_come_in_order(ahead: bool) -> None:
    shelf = Shelf()
    with closing(WeightPrefetch(CPU, shelf.reads(3), ahead=ahead)) as weights:
        found = [int(weights.take()["weight"][0]) for _ in range(3)]
    assert found == shelf.numbers == [0, 1, 2]
    assert (threading.current_thread().name in shelf.threads) is not ahead


def test_one_read_is_ahead_and_no_more() -> None:
    shelf = Shelf()
    with closing(WeightPrefetch(CPU, shelf.reads(3), ahead=True)) as weights:
        weights.take()
        assert weights.waiting is not None
        weights.waiting.result()
        assert shelf.numbers == [0, 1]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_read_raises_is_raised_where_its_weights_are_taken(ahead: bool) -> None:
    with closing(WeightPrefetch(CPU, Shelf().reads(5), ahead=ahead)) as weights:
        for _ in range(3):
            weights.take()
        with pytest.raises(OSError, match="the disk is gone"):
            weights.take()


def test_evaluating_with_read_ahead_gives_the_same_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, in each layer model by model: that order is what may be read ahead."""
    checkpoint = Checkpoint(tiny_model(tmp_path / "model"))
    decoder = Decoder(checkpoint, fitted_architecture(checkpoint), CPU, torch.float32)
    order: list[tuple[str, int]] = []

    def model(name: str, factor: float, layer: int) -> dict[str, Tensor]:
        order.append((name, layer))
        return {key: factor * value for key, value in decoder.layer_weights(layer).items()}

    models = [partial(model, "original", 1.0), partial(model, "quantized", 0.9)]
    batches, layers = [some_tokens(), some_tokens(seed=1)], list[int]()
    plain = evaluation.final_states(decoder, batches, models, layers.append)
    expected, order[:] = list(order), []
    monkeypatch.setattr(evaluation, "WeightPrefetch", partial(WeightPrefetch, ahead=True))
    ahead = evaluation.final_states(decoder, batches, models, layers.append)
    assert order == expected == [(name, layer) for layer in (0, 1) for name in ("original", "quantized")]
    assert layers == [0, 1, 0, 1]
    for first, second in zip(plain, ahead, strict=True):
        torch.testing.assert_close(torch.cat(second), torch.cat(first), rtol=0, atol=0)
