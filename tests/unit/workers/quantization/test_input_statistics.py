"""Running sums against float64 numpy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture, ScaleGroup
from workers.quantization.input_statistics import BLOCK as BLOCKS
from workers.quantization.input_statistics import InputCollector, collecting

BLOCK = BLOCKS["cpu"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_sums_equal_numpy(lengths: list[int], channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, length, channels, generator=generator) for length in lengths]
    collector = InputCollector()
    for batch in batches:
        collector.add(batch)
    statistics = collector.result("x")
    rows = np.concatenate([batch.reshape(-1, channels).numpy() for batch in batches]).astype(np.float64)
    assert statistics.num_tokens == len(rows)
    np.testing.assert_allclose(statistics.abs_mean.numpy(), np.abs(rows).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.moment.numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [BLOCK - 1, BLOCK, 2 * BLOCK + 17])
def test_blocks_join_to_the_whole_matrix(channels: int) -> None:
    rows = torch.randn(50, channels, generator=torch.Generator().manual_seed(0))
    collector = InputCollector()
    collector.add(rows[:20])
    collector.add(rows[20:])
    moment = collector.result("x").moment
    assert torch.equal(moment, moment.T)
    expected = (rows.double().T @ rows.double() / 50).float()
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)


def test_a_token_of_weight_two_counts_as_two() -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    weighted, repeated = InputCollector(), InputCollector()
    weighted.add(rows, torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0]))
    repeated.add(torch.cat([rows, rows[[1, 3]]]))
    ours, theirs = weighted.result("x"), repeated.result("x")
    torch.testing.assert_close(ours.moment, theirs.moment)
    torch.testing.assert_close(ours.abs_mean, theirs.abs_mean)
    assert (ours.num_tokens, theirs.num_tokens) == (6, 8)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    rows = torch.full((70000, 1), 3.0, dtype=torch.float16)  # the sum leaves what float16 can hold
    collector = InputCollector()
    collector.add(rows)
    statistics = collector.result("x")
    assert statistics.abs_mean.tolist() == [3.0]
    assert statistics.moment.tolist() == [[9.0]]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_activations_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    collector = InputCollector()
    collector.add(torch.tensor([[1.0, bad]]))
    with pytest.raises(ModelRefused, match=r"mlp\.up_proj") as refusal:
        collector.result("mlp.up_proj")
    assert refusal.value.code == "activations_not_finite"


def test_the_input_of_the_first_linear_of_each_group_is_collected() -> None:
    layer = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(3, 4), "third": nn.Linear(4, 2)})
    groups = (
        ScaleGroup(smooth_layer="norm", smooth_kind="norm", balance_layers=("first", "second")),
        ScaleGroup(smooth_layer="first", smooth_kind="linear", balance_layers=("third",)),
    )
    architecture = Architecture(model_type="toy", class_name="Toy", stored_layers="layers", groups=groups)
    x = torch.randn(5, 3)
    with torch.no_grad(), collecting(layer, architecture) as collectors:
        hidden = layer["first"](x) + layer["second"](x)
        layer["third"](hidden)
    with torch.no_grad():
        layer["third"](hidden)  # the hooks are gone
    means = [collector.result("x").abs_mean for collector in collectors]
    torch.testing.assert_close(means[0], x.abs().mean(dim=0))
    torch.testing.assert_close(means[1], hidden.abs().mean(dim=0))
    assert [collector.num_tokens for collector in collectors] == [5, 5]
