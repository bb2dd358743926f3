"""A model as one GGUF file, written layer by layer, and read back by the names of its checkpoint.

Sources: gguf 0.19.0, whose writer and names of tensors are used, and llama.cpp's `conversion/llama.py`, whose
order of the rows of q and k is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from app.core.errors import ModelRefused
from app.core.formats.gguf import FAMILIES, GgufFamily, block_of
from app.core.formats.registry import FormatName
from app.core.planning.plan import CandidatePlan, Plan
from app.core.sources.gguf_header import read_gguf_header
from app.core.sources.json_file import ReadableFiles
from app.core.sources.model_headers import ModelHeaders
from app.core.sources.safetensors_header import TensorHeader
from workers.formats.folder import FormatFolder
from workers.formats.gguf_tokenizer import Vocabulary
from workers.formats.shards import DTYPE_NAMES, TensorPlan
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import text_config

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # general.file_type: what most of the matrices are
BLOCK_FORMAT = 2  # general.quantization_version: of GGML's blocks
ROPE_FREQS = "rope_freqs.weight"  # divides the frequencies of the rotary embedding


class GgufEntry(NamedTuple):
    """A tensor of the file."""

    name: str
    kind: Kind
    heads: int = 0  # in whose rows the halves of rotary pairs alternate


class GgufFolder(FormatFolder):
    """One candidate as `model.gguf`. Raises ModelRefused for what the file can't hold."""

    def __init__(
        self, folder: Path, name: FormatName, source: Checkpoint, plan: Plan, candidate: CandidatePlan
    ) -> None:
        super().__init__(folder, name, with_used_tensors(source, plan), plan, candidate)
        assert self.format.single_file is not None
        self.path = folder / self.format.single_file
        self.family = FAMILIES[plan.architecture.model_type]
        self.config = text_config(source.config)
        self.vocabulary = Vocabulary.of(source, self.config.vocab_size)
        names = gguf.get_tensor_name_map(architecture_key(self.family), self.config.num_hidden_layers)
        self.entries = {
            each.name: self.entry_of(each, names)
            for tensor in self.source.tensors
            for each in self.tensor_plans(tensor)
        }

    def write_side_files(self) -> None:
        """All is in the one file."""

    def entry_of(self, plan: TensorPlan, names: gguf.TensorNameMap) -> GgufEntry:
        linear = plan.name.removesuffix(".blocks")
        name = names.get_name(
            f"{linear}.weight" if linear in self.schemes else plan.name, (".weight", ".bias")
        )
        if name is None:
            raise ModelRefused(
                f"llama.cpp has no tensor for {plan.name} in its architecture {self.family.architecture}",
                code="gguf_unsupported", remedy="choose the format compressed-tensors", param="formats",
            )  # fmt: skip
        config, heads = self.config, 0
        if self.family.interleaved:
            counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            heads = counts.get(name.split(".")[-2], 0)
        if linear in self.schemes:
            scheme = self.schemes[linear].scheme
            assert scheme is not None
            return GgufEntry(name, Kind[block_of(scheme).name], heads)
        return GgufEntry(name, Kind[DTYPE_NAMES[plan.dtype]], heads)

    def new_writer(self, plans: list[TensorPlan], shard_bytes: int) -> GgufTensors:
        writer = gguf.GGUFWriter(self.path, self.family.architecture)
        add_settings(writer, self.config, self.family)
        writer.add_quantized_by(f"nibble {version('nibble')}")
        writer.add_file_type(FILE_TYPES[block_of(self.candidate.modules.common).name])
        writer.add_quantization_version(BLOCK_FORMAT)
        self.vocabulary.add_to(writer)
        return GgufTensors(writer, plans, self.entries, rope_factors(self.config))

    def copy(self, name: str) -> None:
        (plan,) = self.tensor_plans(name)
        if self.entries[name].heads or DTYPE_NAMES[plan.dtype] != self.source.tensors[name].dtype:
            assert self.writer is not None
            self.writer.write(name, self.source.tensor(name).to(plan.dtype))
        else:
            super().copy(name)

    def reader(self) -> Checkpoint:
        return GgufCheckpoint(self.path, self.entries)

    @property
    def weight_bytes(self) -> int:
        return self.path.stat().st_size


class GgufTensors:
    """Writes the tensors of `plans`, in that order, behind the header that `writer` holds."""

    def __init__(
        self,
        writer: gguf.GGUFWriter,
        plans: list[TensorPlan],
        entries: Mapping[str, GgufEntry],
        factors: Tensor | None,
    ) -> None:
        self.plans, self.entries, self.position = plans, entries, 0
        self.alignment = writer.data_alignment
        if factors is not None:
            writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.numpy().dtype, factors.nbytes, Kind.F32)
        for plan in plans:
            entry = entries[plan.name]
            numbers = torch.empty(0, dtype=torch.uint8 if plan.dtype == torch.uint8 else torch.float32)
            writer.add_tensor_info(entry.name, plan.shape, numbers.numpy().dtype, plan.size, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (self.file,) = writer.fout
        self.pad()
        if factors is not None:
            self.file.write(factors.numpy().tobytes())
            self.pad()

    def write(self, name: str, values: Tensor) -> None:
        """Append the next tensor of the plan."""
        plan = self.plans[self.position]
        values = values.detach().cpu().to(plan.dtype)
        assert (plan.name, plan.shape) == (name, tuple(values.shape)), plan
        heads = self.entries[name].heads
        flat = (interleaved(values, heads) if heads else values).contiguous().view(-1).view(torch.uint8)
        self.write_bytes(name, iter([flat.numpy().data]))

    def write_bytes(self, name: str, pieces: Iterator[bytes | memoryview]) -> None:
        """Append the next tensor of the plan from the bytes that are stored."""
        plan = self.plans[self.position]
        assert plan.name == name, (plan.name, name)
        written = sum(self.file.write(chunk) for chunk in pieces)
        assert written == plan.size, (name, written, plan.size)
        self.pad()
        self.position += 1

    def pad(self) -> None:
        self.file.write(bytes(-self.file.tell() % self.alignment))

    def close(self) -> None:
        assert self.position == len(self.plans), f"{len(self.plans) - self.position} tensors are missing"
        self.file.close()


class GgufCheckpoint(Checkpoint):
    """The file by the names of its checkpoint: blocks as bytes, other tensors as they are, rows in order."""

    def __init__(self, path: Path, entries: Mapping[str, GgufEntry]) -> None:
        self.entries = entries
        super().__init__(path.parent, partial(headers_of, path.name, entries))

    def tensor(self, name: str, *, pinned: bool = False) -> Tensor:
        values, heads = super().tensor(name, pinned=pinned), self.entries[name].heads
        return separated(values, heads) if heads else values


def headers_of(name: str, entries: Mapping[str, GgufEntry], files: ReadableFiles) -> ModelHeaders:
    stored = read_gguf_header(files, name).tensors
    headers = {}
    for own, entry in entries.items():
        tensor = stored[entry.name]
        shape, dtype = tensor.shape, tensor.kind
        if own.endswith(".blocks"):
            shape, dtype = (shape[0], (tensor.end - tensor.start) // shape[0]), "U8"
        headers[own] = TensorHeader(dtype=dtype, shape=shape, file=name, start=tensor.start, end=tensor.end)
    return ModelHeaders(config={}, tensors=headers, files={}, side_files=(), code=(), notes=())


def with_used_tensors(source: Checkpoint, plan: Plan) -> Checkpoint:
    """Without what the model of the config does not use: of a tied model the head, too."""
    heads = (f"{plan.architecture.head}.weight",) if plan.architecture.tied else ()
    other = copy(source)
    other.tensors = {
        name: header
        for name, header in source.tensors.items()
        if name not in source.unused and name not in heads
    }
    return other


def interleaved(values: Tensor, heads: int) -> Tensor:
    """Rows 0, d/2, 1, d/2 + 1, … of each head of d rows: as llama.cpp's rotary embedding takes them."""
    return values.view(heads, 2, values.shape[0] // heads // 2, -1).transpose(1, 2).reshape(values.shape)


def separated(values: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return values.view(heads, values.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def architecture_key(family: GgufFamily) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)


def add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig, family: GgufFamily) -> None:
    """The keys of the architecture."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for key, name in family.numbers.items():
        writer.add_float32(f"{family.architecture}.{name}", getattr(config, key))


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """float32 (head_size / 2,): what Llama 3's scaling divides frequencies by; None without it."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors: Tensor = 1.0 / config.rope_parameters["rope_theta"] ** exponents / scaled
    return factors
