"""Whether a clip step chose well, by losses in float64: what another implementation chose says less.

Two correct implementations part ways at near ties, and since each list of factors starts from the best of
the one before, a parting may cost a row some percent. So a choice is judged against the candidates that it
was made from: it is right if its true loss exceeds the best one by no more than rounding explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.search.grids import GridRule

# The GPU's tf32 products cut errors off (10 bits of fraction) and round H to the nearest; bfloat16 (7 bits)
# rounds both; float32 has 23 bits.
UNITS = {"tf32": 2.0**-10 + 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23}
TIE = 2.0**-21  # relative: two float32 roundings of w / scale, and as much again
SUMS = 2.0**-15  # relative to the sum of absolute terms: a sum of 128 products, each addition truncated


@dataclass(frozen=True)
class Judge:
    """One group of some rows, as nibble::clip_step gets it, and the arithmetic that is judged.

    `unit` bounds the relative rounding of a product of an error and an entry of H: UNITS.
    """

    weight: Tensor
    block: Tensor
    others: Tensor
    rule: GridRule
    unit: float

    def errors(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """factors: (candidates, 2, rows). Errors (candidates, rows, g) and scales (candidates, rows, 1)."""
        low, high = self.weight.aminmax(dim=1)
        bounds = torch.stack([low.clamp(max=0.0), high.clamp(min=0.0)])
        scale, zero = self.rule.fit(*(factors * bounds)[..., None].unbind(dim=1))
        return self.rule.nearest(self.weight, scale, zero).double() - self.weight.double(), scale.double()

    def losses(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """True losses (candidates, rows), and how far a right implementation may be from them.

        It errs by the rounding of its products and sums; and a weight that lies in the middle between two
        steps of the grid may go to the other one, since it may multiply by 1 / scale.
        """
        errors, scale = self.errors(factors)
        block, others = self.block.double(), self.others.double()
        gradient = errors @ block + others
        size = errors.abs()
        products = (size @ block.abs()) * size
        rounding = self.unit * products + SUMS * (products + 2 * size * others.abs())
        place = self.weight.double() / scale
        near = (place - place.floor() - 0.5).abs() <= TIE * place.abs().clamp(min=1.0)
        flips = near * (2 * scale * gradient.abs() + scale**2 * block.diagonal())
        return (errors * (gradient + others)).sum(dim=-1), (rounding + flips).sum(dim=-1)

    def lists(self, joint: Sequence[float], side: Sequence[float], device: torch.device) -> list[Tensor]:
        """The multiples (candidates, 2, 1) of both factors that are tried one list after the other."""
        both = [[(factor, factor) for factor in factors] for factors in (joint, side)]
        apart = [[(f, 1.0) for f in side], [(1.0, f) for f in side]]
        moves = both if self.rule.symmetric else [both[0], *apart]
        return [torch.tensor([(1.0, 1.0), *each], device=device)[:, :, None] for each in moves]

    def best(self, start: Tensor, joint: Sequence[float], side: Sequence[float]) -> Tensor:
        """The factors (2, rows) that the search ends at with true losses."""
        rows = torch.arange(start.shape[1], device=start.device)
        for multiples in self.lists(joint, side, start.device):
            tried = start * multiples
            start = tried[self.losses(tried)[0].argmin(dim=0), :, rows].T
        return start

    def right(self, start: Tensor, found: Tensor, joint: Sequence[float], side: Sequence[float]) -> Tensor:
        """(rows,): whether a right implementation may end at the factors `found` (2, rows) from `start`.

        Of every way through the lists those are followed whose choices are the best within rounding.
        """
        ways = [(start, torch.ones_like(start[0], dtype=torch.bool))]
        for multiples in self.lists(joint, side, start.device):
            following = []
            for base, possible in ways:
                tried = base * multiples
                losses, slack = self.losses(tried)
                allowed = possible & (losses - slack <= (losses + slack).amin(dim=0))
                following += list(zip(tried, allowed, strict=True))
            ways = following
        return torch.stack([allowed & (way == found).all(dim=0) for way, allowed in ways]).any(dim=0)
