"""`nibble::rounding_errors`, `nibble::clip_step` and `nibble::clip_visit`, with fakes.

Their bodies are PyTorch's operators. Where they can be compiled they are a fused kernel each, on NVIDIA GPUs
(kernels/search/cuda.py) and on CPUs (kernels/search/cpu.py), but for whole rows as groups of the clip step.
kernels/search/search_reference.py is the slow truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.checks import check_contiguous, check_device, check_dtype, check_scheme, check_shape
from kernels.search import cpu, cuda
from kernels.search.grids import GridRule
from kernels.search.losses import matrix_units, quick_dtype

CHUNK = 2**19  # values treated at once: temporaries of a few megabytes stay in a CPU's cache
GPU_CHUNK = 2**25  # bounds the memory of temporaries
ERROR_DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("nibble::rounding_errors", mutates_args=())
def rounding_errors(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    range_factor: float,
    error_dtype: torch.dtype,
) -> Tensor:
    """The change of the weight by rounding `weight diag(s)` to its grid, for each row s of `scales`.

    weight: (rows, C) float32; scales: (candidates, C) float32. The ranges of the groups are shrunk by
    `range_factor`. Errors: (candidates, rows, C).
    """
    check_rounding(weight, scales, bits, group_size, error_dtype)
    rule = GridRule(bits, symmetric, scale_dtype)
    rows, channels = weight.shape
    errors = weight.new_empty((scales.shape[0], rows, channels), dtype=error_dtype)
    if errors.numel() == 0:
        return errors
    if weight.is_cuda and cuda.fits(group_size, (weight,)) and cuda.runs_on(weight.get_device()):
        cuda.rounding_errors(weight, scales, group_size, rule, range_factor, errors)
        return errors
    arguments = (weight, scales, group_size, rule, range_factor, errors)
    if weight.device.type != "cpu" or not cpu.rounding_errors(*arguments):
        round_in_parts(*arguments)
    return errors


def round_in_parts(
    weight: Tensor, scales: Tensor, group_size: int, rule: GridRule, range_factor: float, errors: Tensor
) -> None:
    """rounding_errors by PyTorch's operators, some candidates at a time."""
    rows, channels = weight.shape
    size = channels if group_size == -1 else group_size
    grouped = weight.view(1, rows, channels // size, size)
    for scale_chunk, out in chunks(scales, errors, weight.numel()):
        factors = scale_chunk.view(scale_chunk.shape[0], 1, grouped.shape[2], grouped.shape[3])
        scaled = grouped * factors
        low, high = scaled.aminmax(dim=-1, keepdim=True)
        rounded = rule.nearest(scaled, *rule.fit(low * range_factor, high * range_factor))
        out.view(scale_chunk.shape[0], *grouped.shape[1:]).copy_(rounded.div_(factors).sub_(grouped))


def search_backend(device: torch.device) -> str:
    """The name of the backend that runs the operators, for reports."""
    if device.type == "cpu":
        return cpu.loaded()[1]
    return "cuda" if device.type == "cuda" and cuda.runs_on(device.index or 0) else "torch"


def clip_backend(device: torch.device, group_size: int) -> str:
    """The name of the backend of the clip step: not every group size has a kernel."""
    sizes = {"cpu": cpu.GROUP_SIZES, "cuda": cuda.GROUP_SIZES}.get(device.type, ())
    return search_backend(device) if group_size in sizes else "torch"


def at_once(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def chunks(scales: Tensor, errors: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Candidates and views for their errors, as many as fit in one step."""
    count = max(1, at_once(scales.device) // size)
    return list(zip(torch.split(scales, count), torch.split(errors, count), strict=True))


@rounding_errors.register_fake
def _(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    range_factor: float,
    error_dtype: torch.dtype,
) -> Tensor:
    check_rounding(weight, scales, bits, group_size, error_dtype)
    GridRule(bits, symmetric, scale_dtype)
    return weight.new_empty((scales.shape[0], *weight.shape), dtype=error_dtype)


def check_rounding(
    weight: Tensor, scales: Tensor, bits: int, group_size: int, error_dtype: torch.dtype
) -> None:
    check_dtype("weight", weight.dtype, (torch.float32,))
    check_dtype("scales", scales.dtype, (torch.float32,))
    check_dtype("error_dtype", error_dtype, ERROR_DTYPES)
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; allowed: 2")
    if not weight.is_contiguous():
        raise ValueError(f"weight has strides {weight.stride()}; allowed: those of a contiguous tensor")
    check_scheme(bits, group_size, weight.shape[1])
    if scales.dim() != 2 or scales.shape[1] != weight.shape[1] or not scales.is_contiguous():
        allowed = f"contiguous (candidates, {weight.shape[1]})"
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}, strides {scales.stride()}; allowed: {allowed}"
        )
    check_device("scales", scales, weight.device)


@torch.library.custom_op("nibble::clip_step", mutates_args=("error", "ranges"))
def clip_step(
    weight: Tensor,
    block: Tensor,
    others: Tensor,
    error: Tensor,
    ranges: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    """The best range of one group for every row: the lowest `e B e^T + 2 e o^T`, e the rounding error.

    weight: (rows, g) float32; block B: (g, g), symmetric, H of these columns; others o: (rows, g), the error
    of all other groups times their cross block of H. ranges: (4, rows) float32: the factors that shrink the
    lower and the upper bound, where the search starts from and what it finds, and the scale and zero point
    of the range found. error: (rows, g), where e of that range is written.

    Tried are the start, both bounds times each of `joint`, then the lower bound times each of `side` (on a
    symmetric grid: both), then the upper one; each list relative to the best before it. Ties stay.
    """
    check_clip(weight, block, others, error, ranges)
    rule = GridRule(bits, symmetric, scale_dtype)
    if weight.numel():
        clip_step_of(weight, block, joint, side, rule)(weight, block, others, error, ranges)


def clip_step_of(
    weight: Tensor, block: Tensor, joint: Sequence[float], side: Sequence[float], rule: GridRule
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    """A function that runs clip_step on groups like this one, without its checks."""
    if weight.is_cuda and cuda.fits(weight.shape[1], (weight, block)) and cuda.runs_on(weight.get_device()):
        return cuda.CudaClipStep(weight.shape, weight.device, joint, side, rule)
    if weight.device.type == "cpu" and cpu.can_clip(weight.shape[1]):
        return cpu.CpuClipStep(joint, side, rule)
    count = max(1, at_once(weight.device) // (weight.shape[1] * max(1, len(joint), len(side))))

    def step(weight: Tensor, block: Tensor, others: Tensor, error: Tensor, ranges: Tensor) -> None:
        for start in range(0, weight.shape[0], count):
            rows = slice(start, start + count)
            row_ranges = RowRanges(weight[rows], block, others[rows], rule, ranges[:2, rows])
            row_ranges.search(joint, side)
            error[rows] = row_ranges.error
            ranges[:, rows] = torch.stack([*row_ranges.factors, *row_ranges.grid()])

    return step


@clip_step.register_fake
def _(
    weight: Tensor,
    block: Tensor,
    others: Tensor,
    error: Tensor,
    ranges: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    check_clip(weight, block, others, error, ranges)
    GridRule(bits, symmetric, scale_dtype)


@torch.library.custom_op("nibble::clip_visit", mutates_args=("error", "ranges"))
def clip_visit(
    weight: Tensor,
    moment: Tensor,
    error: Tensor,
    ranges: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    """A clip step for every group in turn, each seeing the errors that the ones before it were left with.

    weight: (rows, C) float32; moment: (C, C), symmetric; error: (rows, C), of the present ranges;
    ranges: (groups, 4, rows), those of clip_step.
    """
    check_visit(weight, moment, error, ranges)
    rule = GridRule(bits, symmetric, scale_dtype)
    if weight.numel() == 0:
        return
    size = weight.shape[1] // ranges.shape[0]
    errors, weights = torch.split(error, size, dim=1), torch.split(weight, size, dim=1)
    blocks = [block[at * size : (at + 1) * size] for at, block in enumerate(torch.split(moment, size, dim=1))]
    step = clip_step_of(weights[0], blocks[0], joint, side, rule)
    # The quick dtype is precise enough for the share of the other groups' errors.
    multiplied = error.to(quick_dtype(weight.device, weight.shape[1]))
    columns = torch.split(moment.to(multiplied.dtype), size, dim=1)
    with matrix_units(weight.device):
        for index, (own, quick) in enumerate(zip(ranges, torch.split(multiplied, size, dim=1), strict=True)):
            quick.zero_()
            others = (multiplied @ columns[index]).to(torch.float32)
            step(weights[index], blocks[index], others, errors[index], own)
            if multiplied is not error:
                quick.copy_(errors[index])


@clip_visit.register_fake
def _(
    weight: Tensor,
    moment: Tensor,
    error: Tensor,
    ranges: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    check_visit(weight, moment, error, ranges)
    GridRule(bits, symmetric, scale_dtype)


def check_visit(weight: Tensor, moment: Tensor, error: Tensor, ranges: Tensor) -> None:
    if weight.dim() != 2 or ranges.dim() != 3:
        raise ValueError(f"weight has {weight.dim()} dimensions and ranges {ranges.dim()}; allowed: 2 and 3")
    rows, channels = weight.shape
    groups = max(1, ranges.shape[0])
    if channels % groups:
        raise ValueError(f"ranges has shape {tuple(ranges.shape)}; allowed: groups that divide {channels}")
    expected = {"moment": (channels, channels), "error": (rows, channels), "ranges": (groups, 4, rows)}
    tensors = {"weight": weight, "moment": moment, "error": error, "ranges": ranges}
    for name, tensor in tensors.items():
        check_dtype(name, tensor.dtype, (torch.float32,))
        check_shape(name, tensor, expected.get(name, (rows, channels)))
        check_device(name, tensor, weight.device)
        check_contiguous(name, tensor)


def check_clip(weight: Tensor, block: Tensor, others: Tensor, error: Tensor, ranges: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; allowed: 2")
    rows, size = weight.shape
    expected = {"weight": (rows, size), "block": (size, size), "others": (rows, size), "error": (rows, size)}
    tensors = {"weight": weight, "block": block, "others": others, "error": error, "ranges": ranges}
    for name, tensor in tensors.items():
        check_dtype(name, tensor.dtype, (torch.float32,))
        check_shape(name, tensor, expected.get(name, (4, rows)))
        check_device(name, tensor, weight.device)
        if tensor.numel() and tensor.stride(1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; allowed: neighbours in a row at 1")


class RowRanges:
    """The best range so far of one group for some rows, with its error and its loss."""

    def __init__(self, weight: Tensor, block: Tensor, others: Tensor, rule: GridRule, start: Tensor) -> None:
        self.weight, self.block, self.others, self.rule = weight, block, others, rule
        low, high = weight.aminmax(dim=1)
        self.bounds = torch.stack([low.clamp(max=0.0), high.clamp(min=0.0)])
        self.factors = start.clone()  # (2, rows): of the lower and the upper bound
        candidates = self.factors[None]
        self.error = self.errors(candidates)[0]
        self.loss = self.losses(self.error[None])[0]

    def errors(self, factors: Tensor) -> Tensor:
        """factors: (candidates, 2, rows); errors: (candidates, rows, g)."""
        low, high = (factors * self.bounds)[..., None].unbind(dim=1)
        scale, zero = self.rule.fit(low, high)
        return self.rule.nearest(self.weight, scale, zero).sub_(self.weight)

    def losses(self, errors: Tensor) -> Tensor:
        """(candidates, rows)."""
        products = (errors.flatten(0, 1) @ self.block).view_as(errors)
        return products.add_(self.others, alpha=2).mul_(errors).sum(dim=-1)

    def search(self, joint: Sequence[float], side: Sequence[float]) -> None:
        """Both bounds together, then one after the other."""
        self.try_factors(joint, low=True, high=True)
        self.try_factors(side, low=True, high=self.rule.symmetric)
        if not self.rule.symmetric:
            self.try_factors(side, low=False, high=True)

    def try_factors(self, multiples: Sequence[float], *, low: bool, high: bool) -> None:
        """Move the bounds of each row to the best of these multiples where that lowers its loss."""
        if not multiples:
            return
        steps = torch.tensor(multiples, dtype=torch.float32, device=self.weight.device)[:, None]
        moved = self.factors.expand(len(multiples), -1, -1).clone()
        if low:
            moved[:, 0] *= steps
        if high:
            moved[:, 1] *= steps
        errors = self.errors(moved)
        losses = self.losses(errors)
        loss, best = torch.where(torch.isnan(losses), torch.inf, losses).min(dim=0)
        better = loss < self.loss
        rows = torch.arange(len(best), device=best.device)
        self.factors = torch.where(better, moved[best, :, rows].T, self.factors)
        self.error = torch.where(better[:, None], errors[best, rows], self.error)
        self.loss = torch.where(better, loss, self.loss)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the best range, (rows,) each."""
        return self.rule.fit(*(self.factors * self.bounds).unbind())
