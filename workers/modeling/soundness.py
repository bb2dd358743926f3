"""What is found wrong with a model before hours of work: missing weights, NaN, a foreign tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.planning.plan import layer_number
from workers.modeling.checkpoint import DTYPES, Checkpoint, all_finite, read_into
from workers.modeling.decoder import Decoder

PIECE = 16 * 1024**2


def refuse_misfits(decoder: Decoder) -> None:
    """Raises ModelRefused unless the checkpoint holds every weight that its config asks for."""
    stored = decoder.checkpoint.tensors
    for name, value in decoder.model.state_dict().items():
        found = stored_name(decoder, name)
        wanted = list(value.shape)
        if found not in stored:
            raise ModelRefused(
                f"{found} is missing; config.json asks for it with the shape {wanted}",
                code="weights_missing",
                remedy="check that all shards are there and that config.json belongs to them",
            )
        if list(stored[found].shape) != wanted:
            raise ModelRefused(
                f"{found} has the shape {list(stored[found].shape)}, config.json asks for {wanted}",
                code="weights_mismatch", remedy="restore the model's original config.json",
            )  # fmt: skip


def stored_name(decoder: Decoder, name: str) -> str:
    """The checkpoint's name of a parameter."""
    layer = layer_number(decoder.architecture, name)
    if layer is None:
        return decoder.found(name)
    prefix = decoder.architecture.layer_prefix(layer)
    return prefix + decoder.architecture.stored_name(name.removeprefix(prefix))


def refuse_broken_weights(checkpoint: Checkpoint, without: tuple[str, ...] = ()) -> None:
    """Read every weight once. Raises ModelRefused for NaN and infinity,
    but for names that end as `without`.

    Each is checked when it is used, too: for the last layer that can be hours later.
    """
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    for name, header in checkpoint.tensors.items():
        dtype = DTYPES[header.dtype]
        if not dtype.is_floating_point or name.endswith(without):
            continue
        for start in range(header.start, header.end, PIECE):
            values = buffer[: min(PIECE, header.end - start)].view(dtype)
            read_into(checkpoint.folder / header.file, start, values)
            if not all_finite(values):
                raise checkpoint.broken(name)


def refuse_foreign_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ModelRefused if the tokenizer names tokens that the model has not."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ModelRefused(
            f"the tokenizer gives token {largest}, the model knows those below {vocab_size}",
            code="tokenizer_mismatch", remedy="add the tokenizer that belongs to the model",
        )  # fmt: skip
