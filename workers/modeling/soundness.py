"""Checks of a model before hours of work: missing weights, NaN, a foreign tokenizer."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from torch import Tensor, nn

from app.core.errors import ModelRefused
from workers.modeling.checkpoint import Checkpoint, all_finite
from workers.modeling.decoder import Decoder
from workers.modeling.stored_dtypes import DTYPES


def refuse_misfits(decoder: Decoder) -> list[str]:
    """The tensors that the language model does not use: those of towers for images, of drafts, old buffers.

    Raises ModelRefused unless the checkpoint holds every weight that its config asks for, and no more of a
    linear than it asks for: a bias or scale that is left out changes what the linear computes.
    """
    stored, used = decoder.checkpoint.tensors, set[str]()
    for name, value in decoder.model.state_dict().items():
        if not decoder.architecture.of_language(name):
            continue
        key = decoder.stored_name(name)
        shape = list(value.shape)
        parts = decoder.architecture.parts_of(name)
        used.update(parts or (key,))
        if parts and all(each in stored for each in parts):
            continue
        if key not in stored:
            raise ModelRefused(
                f"{key} is missing; config.json asks for it with the shape {shape}",
                code="weights_missing",
                remedy="check that all shards are there and that config.json belongs to them",
            )
        if list(stored[key].shape) != shape:
            raise ModelRefused(
                f"{key} has the shape {list(stored[key].shape)}, config.json asks for {shape}",
                code="weights_mismatch", remedy="restore the model's original config.json",
            )  # fmt: skip
    unused = [name for name in stored if name not in used]
    linears = [
        name
        for name, module in decoder.model.named_modules()
        if isinstance(module, nn.Linear) and decoder.architecture.of_language(name)
    ]
    named = {decoder.stored_name(f"{name}.weight").removesuffix(".weight") for name in linears}
    tensor = next(parts_of(unused, named), None)
    if tensor is not None:
        raise ModelRefused(
            f"{tensor} is a part of a linear that config.json does not ask for",
            code="weights_mismatch",
            remedy="restore the model's original config.json, or remove the tensor from the file",
        )
    return unused


def parts_of(tensors: Iterable[str], modules: Container[str]) -> Iterator[str]:
    """The tensors that are parts of one of the modules."""
    return (name for name in tensors if name.rpartition(".")[0] in modules)


def some(tensors: Sequence[str]) -> str:
    """Tensors in words: the first, and how many more."""
    return tensors[0] + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")


def refuse_broken_weights(checkpoint: Checkpoint) -> None:
    """Read every weight once that is used. Raises ModelRefused for NaN and infinity.

    Each is checked when it is used, too: for the last layer that can be hours later.
    """
    for name, header in checkpoint.tensors.items():
        if not DTYPES[header.dtype].is_floating_point or name in checkpoint.unused:
            continue
        if not all(all_finite(chunk) for chunk in checkpoint.chunks(name)):
            raise checkpoint.broken(name)


def refuse_foreign_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ModelRefused if the tokenizer has tokens that the model lacks."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ModelRefused(
            f"the tokenizer gives token {largest}, the model knows those below {vocab_size}",
            code="tokenizer_mismatch", remedy="add the tokenizer that belongs to the model",
        )  # fmt: skip
