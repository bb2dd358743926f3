"""Tensors of GGUF files, dequantized while they are read; and the tokenizer that such a file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.sources.gguf_header import read_gguf_header
from app.core.sources.local_model import LocalModel
from app.core.sources.safetensors_header import TensorHeader
from workers.modeling.stored_bytes import read_into

# Splits of text before BPE for which transformers' default is right. SmolLM's own cuts numbers into digits,
# which its vocabulary does anyway: it has no token of two.
PLAIN_SPLITS = ("default", "gpt-2", "smollm")


def dequantized_chunks(path: Path, header: TensorHeader, chunk_bytes: int) -> Iterator[Tensor]:
    """The values in order, flat, as float32: whole rows, and of interleaved rows whole heads, at a time."""
    columns = header.shape[-1]
    rows = math.prod(header.shape[:-1])
    row_bytes = (header.end - header.start) // rows
    unit = rows // header.interleaved if header.interleaved else 1
    step = max(1, chunk_bytes // (4 * columns * unit)) * unit
    kind = GGMLQuantizationType[header.encoding or header.dtype]
    for first in range(0, rows, step):
        stored = torch.empty(min(step, rows - first), row_bytes, dtype=torch.uint8)
        read_into(path, header.start + first * row_bytes, stored)
        values = torch.from_numpy(dequantize(stored.numpy(), kind))
        if unit > 1:  # the rows 0, d/2, 1, d/2 + 1, … of each head of d rows, back in order
            values = values.view(-1, unit // 2, 2, columns).transpose(1, 2)
        yield values.reshape(-1)


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """The tokenizer and chat template of a GGUF file, as files of `folder`.

    Raises ModelRefused for one that transformers does not build as the file says.
    """
    # Imported here: it brings the tokenizers of several families with it.
    from transformers import PreTrainedTokenizerFast  # here, as its import takes seconds
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    header = read_gguf_header(LocalModel(gguf.parent, (Path("/"),)), gguf.name)
    name = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in PLAIN_SPLITS and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise unsupported(gguf, f"tokenizer.ggml.pre is {name[:100]!r}, which is not known here")
    with TemporaryDirectory() as alone:  # nothing that lies beside the file is looked at
        (Path(alone) / "model.gguf").symlink_to(gguf.absolute())
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf")
        except Exception as fault:  # transformers raises what it likes of what a file can hold
            raise unsupported(gguf, f"{type(fault).__name__}: {fault}") from fault
    tokenizer.name_or_path = ""
    tokenizer.save_pretrained(folder)


def unsupported(gguf: Path, why: str) -> ModelRefused:
    return ModelRefused(
        f"the tokenizer in {gguf.name} can't be used: {why}",
        code="gguf_unsupported",
        remedy="put the tokenizer.json and tokenizer_config.json of the original model beside the file",
        param="model",
    )
