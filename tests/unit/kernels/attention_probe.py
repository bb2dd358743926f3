"""Runs the attention kernel in Triton's interpreter (TRITON_INTERPRET=1): a relative error for each case."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.nn import functional

from kernels.triton_backend.attention_kernel import attend

# (rows, heads, key/value heads, columns, size, value size, processors)
CASES = [
    (2, 4, 4, 64, 16, 16, 1), (3, 8, 2, 200, 32, 16, 4), (2, 6, 2, 130, 64, 64, 132),
    (5, 4, 1, 70, 16, 32, 8), (2, 32, 1, 300, 16, 16, 64),
]  # fmt: skip


def shown(rows: int, columns: int) -> Tensor:
    """Rows that end in one column and begin in several; one sees a window, one its own token alone."""
    column, end = torch.arange(columns), columns - columns // 5
    first = torch.tensor([(row * 37) % end for row in range(rows)])
    first[-1] = end
    return (column >= first[:, None]) & (column <= end)


def main() -> None:
    errors = {}
    for rows, heads, kv_heads, columns, size, value_size, processors in CASES:
        mask = shown(rows, columns)
        query = torch.randn(rows, heads, size)
        keys, values = (
            torch.randn(rows, kv_heads, columns, size),
            torch.randn(rows, kv_heads, columns, value_size),
        )
        group = heads // kv_heads
        expected = functional.scaled_dot_product_attention(
            query[:, :, None].double(), keys.double().repeat_interleave(group, 1),
            values.double().repeat_interleave(group, 1), attn_mask=mask[:, None, None], scale=0.3,
        )[:, :, 0]  # fmt: skip
        # What is not shown is not read: a NaN there would be seen.
        hidden = ~mask[:, None, :, None]
        output = attend(
            query, keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, torch.nan), mask, 0.3,
            processors=processors, upcast=True,
        )  # fmt: skip
        error = float((output.double() - expected).norm() / expected.norm())
        errors[f"{rows} {heads}/{kv_heads} {columns} {size}"] = error if error == error else None
    sys.stdout.write(json.dumps(errors) + "\n")


if __name__ == "__main__":
    main()
