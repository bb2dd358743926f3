"""What rounding a linear's input adds to the error at its output, as scales change it.

An input x / s is rounded to integers of one step; its error is taken as uniform over a step and independent
from channel to channel, so it adds `sum_c var_c |W_c s_c|^2`. A token's largest value decides the step: it is
estimated from the channels' second moments, or is what calibration saw where files hold that. Numbers with
an exponent err in proportion to each value, whatever the scales, and add nothing here. As SmoothQuant (arXiv
2211.10438) this moves what is hard to round from inputs to weights, and the loss says how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import InputRounding
from workers.modeling.input_rounding import largest_number
from workers.quantization.input_statistics import InputStatistics

# A token's largest square is between one variance (a channel that stands out) and several (one of many): the
# norm of this power over the channels, times this factor, is within a factor of two for both.
POWER, LARGEST = 4, 1.8


class WeightOfScheme(Protocol):
    """A linear's weight (rows, C) and its scheme."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def scheme(self) -> Scheme: ...


def input_noise(linears: Sequence[WeightOfScheme], scales: Tensor, statistics: InputStatistics) -> Tensor:
    """(candidates,): the expected squared error at the output of all linears, for each row of `scales`."""
    total = torch.zeros(len(scales), device=scales.device)
    for linear in linears:
        inputs = linear.scheme.kind.inputs
        if inputs is None or inputs.numbers == "float":
            continue
        steps = step_sizes(inputs, scales, statistics)
        columns = linear.weight.square().sum(dim=0)
        total += (steps.square() / 12 * scales.square()) @ columns
    return total


def step_sizes(inputs: InputRounding, scales: Tensor, statistics: InputStatistics) -> Tensor:
    """(candidates, 1): between neighbouring integers that an input x / s can become."""
    if inputs.needs_range and statistics.abs_max is not None:
        largest = (statistics.abs_max / scales).amax(dim=1, keepdim=True)
    else:
        squares = statistics.moment.diagonal().clamp(min=0) / scales.square()
        largest = (LARGEST * squares.norm(p=POWER, dim=1, keepdim=True)).sqrt()
    return largest / largest_number(inputs)
