"""Runs the Triton kernel in its interpreter (TRITON_INTERPRET=1), case by case: a relative error each."""

from __future__ import annotations

import itertools
import json
import sys

import torch

from kernels import reference
from kernels.triton_backend.linear_kernel import linear
from tests.unit.kernels.weights import random_input, random_weight

# (bits, group, rows, channels, tokens, asymmetric, dtype): every scheme, then ragged shapes and every dtype.
SCHEMES = [
    (bits, group, 40, 256, 5, asymmetric, torch.float16)
    for bits, group, asymmetric in itertools.product((2, 3, 4, 8), (32, 64, 128, -1), (False, True))
]
SHAPES = [
    (4, 32, 1, 32, 1, True, torch.float16),
    (3, -1, 70, 100, 17, True, torch.float16),
    (4, 64, 65, 192, 33, False, torch.bfloat16),
    (8, 128, 130, 128, 70, True, torch.float32),
    (4, 32, 16, 64, 0, False, torch.float16),
]


def main() -> None:
    errors = {}
    for bits, group, rows, channels, tokens, asymmetric, dtype in SCHEMES + SHAPES:
        weight = random_weight(rows, channels, bits=bits, group_size=group, asymmetric=asymmetric)
        x, bias = random_input((tokens, channels), dtype), random_input((rows,), dtype)
        upcast = dtype != torch.float16
        output = linear(x, weight, bias, processors=16, upcast=upcast)
        expected = reference.quantized_linear(x, weight, bias)
        error = (output.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        name = f"w{bits} g{group} {rows}x{channels} m{tokens} {asymmetric} {dtype}"
        errors[name] = float(error) if output.shape == expected.shape else None
    sys.stdout.write(json.dumps(errors) + "\n")


if __name__ == "__main__":
    main()
