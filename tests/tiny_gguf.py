"""A tiny model as a GGUF file, written by llama.cpp's own library as its converter writes it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from app.core.sources.gguf_model import ARCHITECTURES, OUTSIDE
from tests.tiny_models import TOKENIZER

FILE = "tiny.Q4_1.gguf"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's rotary embedding takes them."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(
    model: PreTrainedModel, folder: Path, kind: Kind = Kind.Q4_1, *, tied: bool = False, **keys: object
) -> Path:
    """The folder of `model`, with matrices of the type `kind`. In the names of `keys` __ stands for a dot."""
    config, name = model.config, model.config.model_type
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / FILE, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_rope_dimension_count(head_size)
    for key, value in keys.items():
        key = key.replace("__", ".")
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    add_tokenizer(writer)
    for local, value in stored_tensors(model, tied=tied).items():
        own = kind if value.dim() > 1 else Kind.F32
        writer.add_tensor(local, gguf.quantize(value.numpy().astype(np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def stored_tensors(model: PreTrainedModel, *, tied: bool) -> dict[str, Tensor]:
    """The tensors by their names in the file."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    names = dict(OUTSIDE)
    for layer in range(config.num_hidden_layers):
        names |= {
            f"blk.{layer}.{own}": f"model.layers.{layer}.{name}" for own, name in architecture.layer.items()
        }
    state = model.state_dict()
    tensors = {own: state[name] for own, name in names.items() if not (tied and own == "output.weight")}
    counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for own, value in tensors.items():
        heads = counts.get(own.split(".")[-2])
        if architecture.interleaved and heads:
            tensors[own] = interleaved(value, heads)
    return tensors


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    described = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    special = {token["id"] for token in described["added_tokens"]}
    vocabulary = {number: text for text, number in described["model"]["vocab"].items()}
    vocabulary |= {token["id"]: token["content"] for token in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary[number] for number in range(len(vocabulary))])
    writer.add_token_types([3 if number in special else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template((TOKENIZER / "chat_template.jinja").read_text("utf-8"))


def read_by_transformers(folder: Path) -> dict[str, Tensor]:
    """The tensors of the file as transformers reads them, in float32."""
    from transformers import AutoModelForCausalLM

    return dict(
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).state_dict()
    )
