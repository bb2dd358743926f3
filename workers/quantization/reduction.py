"""Processes that each pass a share of the batches through a model: the first gets the sums of all.

torch.distributed moves the tensors: NCCL between GPUs, gloo between CPUs. Sums are those of one process up
to the order of additions in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the batches."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this rank receives the sums of all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The part of all batches that this process takes; the first batch is rank 0's."""
        return list(items[self.rank :: self.size])

    def owner(self, batch: int) -> int:
        """The rank whose share has this one of all batches."""
        return batch % self.size

    def add_up(self, totals: Sequence[Tensor]) -> None:
        """Give rank 0 the sums of all; the others' are of no use any more."""
        if self.size > 1:
            for total in totals:
                dist.reduce(total, 0)

    def take_largest(self, values: Tensor) -> None:
        """Give rank 0 the largest of all in each place; the others' are of no use any more."""
        if self.size > 1:
            dist.reduce(values, 0, op=dist.ReduceOp.MAX)

    def hand_out(self, values: Sequence[Tensor]) -> None:
        """Fill the tensors of every rank with those of rank 0."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, 0)

    def bring(self, value: Tensor, owner: int) -> None:
        """Fill rank 0's tensor with the owner's; the others take no part."""
        if owner != 0 and self.rank == owner:
            dist.send(value, 0)
        elif owner != 0 and self.is_first:
            dist.recv(value, owner)


ALONE = Ranks(0, 1)
