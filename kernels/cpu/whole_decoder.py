"""A whole decoder of Llama's shape as one call of the native library (csrc/cpu/decoder.cpp).

Between PyTorch's small operators lies most of the time of a token of a small model. Here all layers take one
call, with float32 between the packed weights and the cache.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.blocked_layout import BlockedWeight
from kernels.cpu.native import TYPES, Blocks
from kernels.cpu.native_library import (
    DECODER,
    LANES_NEED,
    VECTORS_NEED,
    BlockedStruct,
    NotCompiled,
    address,
    built,
    check_processor,
    processor,
)

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)  # attention.h has loops for these
CHANNEL_MULTIPLE = 32  # of the widths that rows of x have

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


def reads_lanes() -> bool:
    """Whether the library multiplies packed weights as integers (csrc/cpu/lanes.h)."""
    return processor()[1] >= LANES_NEED


def keeps_floats(dtype: torch.dtype) -> bool:
    """Whether integers of inputs must keep more of them than bfloat16 holds."""
    return dtype != torch.bfloat16


class LinearStruct(ctypes.Structure):
    """`Linear` of products.h."""

    _fields_ = (
        ("packed", ctypes.POINTER(BlockedStruct)), ("dense", POINTER), ("type", NUMBER),
        ("in_features", NUMBER), ("out_features", NUMBER), ("bias", POINTER), ("fine", NUMBER),
    )  # fmt: skip


LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


class LayerStruct(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = (
        *((name, LinearStruct) for name in LINEARS), *((name, POINTER) for name in NORMS), ("window", NUMBER)
    )  # fmt: skip


class DecoderStruct(ctypes.Structure):
    """`Decoder` of decoder.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)), ("num_layers", NUMBER), ("hidden", NUMBER),
        ("intermediate", NUMBER), ("heads", NUMBER), ("kv_heads", NUMBER), ("head_size", NUMBER),
        ("embedding", POINTER), ("embedding_type", NUMBER), ("cosines", POINTER), ("sines", POINTER),
        ("final_norm", POINTER), ("head", LinearStruct), ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )  # fmt: skip


class TokensStruct(ctypes.Structure):
    """`Tokens` of decoder.cpp."""

    _fields_ = (
        ("count", NUMBER), ("ids", POINTER), ("positions", POINTER), ("rows", POINTER), ("columns", POINTER),
        ("firsts", POINTER), ("outputs", NUMBER), ("asked", POINTER),
    )  # fmt: skip


class CacheStruct(ctypes.Structure):
    """`CacheRows` of attention.h."""

    _fields_ = (
        ("keys", POINTER), ("values", POINTER), ("row_stride", NUMBER), ("head_stride", NUMBER),
        ("type", NUMBER),
    )  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A linear's weight, packed or (out_features, in_features), and its bias in any dtype."""

    weight: BlockedWeight | Tensor
    bias: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        if isinstance(self.weight, BlockedWeight):
            return self.weight.out_features, self.weight.in_features
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: linears and norms by the names of LINEARS and NORMS."""

    linears: dict[str, Weight]
    norms: dict[str, Tensor | None]
    window: int = 0  # columns that a token attends to, itself included; 0: all


@dataclass(frozen=True)
class DecoderWeights:
    """All that a decoder of Llama's shape computes from."""

    layers: Sequence[LayerWeights]
    embedding: Tensor  # (vocabulary, hidden)
    final_norm: Tensor  # (hidden)
    head: Weight
    cosines: Tensor  # float32 (positions, head size / 2)
    sines: Tensor
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    scaling: float


@dataclass(frozen=True)
class TokenPlaces:
    """Tokens of any sequences, each later than those of its sequence before it: ids, and where they are."""

    ids: Sequence[int]
    positions: Sequence[int]
    rows: Sequence[int]  # of the cache
    columns: Sequence[int]  # that take their keys and values
    firsts: Sequence[int]  # the first column of the token's sequence
    asked: Sequence[int]  # the indices of the tokens whose logits are returned


@functools.cache
def decoder_library() -> ctypes.CDLL | str:
    """The library, or why it can't be compiled: a process tries once."""
    try:
        check_processor(VECTORS_NEED)
        library = built(DECODER, tiles=False)
    except NotCompiled as fault:
        return str(fault)
    library.nibble_decode.argtypes = [
        *map(ctypes.POINTER, (DecoderStruct, TokensStruct, CacheStruct)), POINTER, ctypes.c_int
    ]  # fmt: skip
    library.nibble_product.argtypes = [ctypes.POINTER(LinearStruct), POINTER, NUMBER, POINTER, ctypes.c_int]
    library.nibble_decode.restype = library.nibble_product.restype = None
    return library


def unsupported(weights: DecoderWeights) -> str | None:
    """Why the library can't compute this decoder, or None. The first call compiles it."""
    if weights.head_size not in HEAD_SIZES:
        return f"heads of {weights.head_size}; there are loops for {', '.join(map(str, HEAD_SIZES))}"
    widths = {weights.embedding.shape[1], weights.heads * weights.head_size}
    widths |= {layer.linears["gate"].sizes[0] for layer in weights.layers}
    odd = sorted(width for width in widths if width % CHANNEL_MULTIPLE)
    if odd:
        return f"{odd[0]} channels are no multiple of {CHANNEL_MULTIPLE}"
    library = decoder_library()
    return library if isinstance(library, str) else None


class NativeDecoder:
    """The decoder, ready to be called."""

    def __init__(self, weights: DecoderWeights, *, reads_prompts: bool = True) -> None:
        self.reads_prompts = reads_prompts  # else only what follows them
        library = decoder_library()
        if isinstance(library, str):
            raise NotCompiled(library)
        self._decode = library.nibble_decode
        self._alive: list[object] = []  # what the structs hold addresses of
        self._fine = keeps_floats(weights.embedding.dtype)
        self.vocabulary = weights.head.sizes[0]
        self.kv_heads, self.head_size = weights.kv_heads, weights.head_size
        layers = (LayerStruct * len(weights.layers))(*map(self._layer, weights.layers))
        self._alive.append(layers)
        self._struct = DecoderStruct(
            layers=layers,
            num_layers=len(weights.layers),
            hidden=weights.embedding.shape[1],
            intermediate=weights.layers[0].linears["gate"].sizes[0],
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_size=weights.head_size,
            embedding=self._address(weights.embedding),
            embedding_type=TYPES[weights.embedding.dtype],
            cosines=self._floats(weights.cosines),
            sines=self._floats(weights.sines),
            final_norm=self._floats(weights.final_norm),
            head=self._linear(weights.head),
            epsilon=weights.epsilon,
            scaling=weights.scaling,
        )
        self._reference = ctypes.byref(self._struct)

    def __call__(self, tokens: TokenPlaces, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """float32 logits (asked, vocabulary); the tokens' keys and values are written into the cache.

        Each of `keys` and `values` is a layer's (rows, heads, columns, head size), all of a dtype and shape.
        """
        columns = [tokens.ids, tokens.positions, tokens.rows, tokens.columns, tokens.firsts, tokens.asked]
        arrays = [(NUMBER * len(column))(*column) for column in columns]
        ids, positions, rows, places, firsts, asked = map(ctypes.addressof, arrays)
        batch = TokensStruct(len(tokens.ids), ids, positions, rows, places, firsts, len(tokens.asked), asked)
        pointers = [(POINTER * len(each))(*map(address, each)) for each in (keys, values)]
        row_stride, head_stride, _, _ = keys[0].stride()
        cache = CacheStruct(*map(ctypes.addressof, pointers), row_stride, head_stride, TYPES[keys[0].dtype])
        logits = torch.empty(len(tokens.asked), self.vocabulary)
        self._decode(
            self._reference,
            ctypes.byref(batch),
            ctypes.byref(cache),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits

    def _layer(self, weights: LayerWeights) -> LayerStruct:
        linears = {name: self._linear(weights.linears[name]) for name in LINEARS}
        norms = {name: self._floats(weights.norms.get(name)) for name in NORMS}
        return LayerStruct(**linears, **norms, window=weights.window)

    def _linear(self, linear: Weight) -> LinearStruct:
        rows, channels = linear.sizes
        struct = LinearStruct(in_features=channels, out_features=rows, bias=self._floats(linear.bias))
        if isinstance(linear.weight, BlockedWeight):
            weight = linear.weight
            blocks = Blocks.of(weight)
            self._alive.append(blocks)
            struct.fine = self._fine
            struct.packed = ctypes.pointer(blocks.struct)
        else:
            struct.dense, struct.type = self._address(linear.weight), TYPES[linear.weight.dtype]
        return struct

    def _floats(self, values: Tensor | None) -> int | None:
        return None if values is None else self._address(values.float())

    def _address(self, values: Tensor) -> int:
        """Of a tensor that stays."""
        whole = values.contiguous()
        self._alive.append(whole)
        return whole.data_ptr()
