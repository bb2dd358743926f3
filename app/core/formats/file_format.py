"""The interface of file formats, and the integer grids that they describe.

The plan, the estimate, the writer, the reader and the inference server ask the description of a format;
`workers/formats` packs and unpacks its tensors. The notes on loaders were read in the sources of vLLM 0.33.0
(`auto_gptq.py`, `compressed_tensors_wNa16.py` and the kernels that it chooses from), SGLang 0.5.23
(`compressed_tensors_wNa16.py`, `gptq.py`) and transformers 5.24.0 (`quantizers`, `integrations`).
compressed-tensors 0.17, 0.18 and 0.20 and GPTQModel 7.7.0 were run.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from app.core.formats.schemes import SCHEMES, CacheName, SchemeKind, SchemeName

WORD_BITS = 32
EVERYWHERE = (4, 8)  # bits that all servers read


class Scheme(BaseModel, frozen=True, extra="forbid"):
    """The numbers of one linear. `group_size` -1 is one group per output channel."""

    bits: int
    group_size: int
    symmetric: bool
    name: SchemeName = "wna16"

    @property
    def kind(self) -> SchemeKind:
        return SCHEMES[self.name]

    @property
    def is_plain(self) -> bool:
        """Whether it is an integer grid for weights alone, which kernels compute from."""
        return self.name == "wna16"

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size


class FormatRefusal(NamedTuple):
    """Why a format can't hold a model, and the nearest recipe that it holds."""

    why: str
    nearest: str


class StoredTensor(NamedTuple):
    """A tensor in the files: its shape, and its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModuleSchemes:
    """A model for formats: the scheme of every linear, None for one that keeps its precision."""

    linears: Mapping[str, Scheme | None]  # by the checkpoint's names, in the order of data
    full_precision: tuple[str, ...] = ()  # modules beside them that no recipe quantizes
    towers: tuple[str, ...] = ()  # the names, in their paths, of modules that hold some of these
    head: str | None = None  # of the linears the one that is the head, if it is quantized
    cache: CacheName | None = None  # of keys and values, in whose scales it is rounded
    fused_experts: bool = False  # those that keep their precision are one tensor a layer

    @property
    def tower_patterns(self) -> tuple[str, ...]:
        """Match what is in the towers, whatever loaders call the model around them."""
        return tuple(rf"(.*\.)?{re.escape(tower)}(\..*)?$" for tower in self.towers)

    @property
    def head_pattern(self) -> str:
        """Matches the head, whatever loaders call the model around it."""
        assert self.head is not None
        return rf"(.*\.)?{re.escape(self.head.rpartition('.')[2])}$"

    @property
    def distinct(self) -> tuple[Scheme, ...]:
        return tuple(dict.fromkeys(scheme for scheme in self.linears.values() if scheme is not None))

    @property
    def common(self) -> Scheme:
        """The scheme that most of the linears have; at least one must have any."""
        counts = Counter(scheme for scheme in self.linears.values() if scheme is not None)
        return counts.most_common(1)[0][0]

    @property
    def unquantized(self) -> tuple[str, ...]:
        """The modules that loaders must not take for quantized linears."""
        return (*(name for name, scheme in self.linears.items() if scheme is None), *self.full_precision)

    @property
    def of_experts(self) -> set[Scheme | None]:
        return {scheme for name, scheme in self.linears.items() if ".experts." in name}

    @property
    def narrow(self) -> str:
        """In words: the bits that not all servers read; empty if they read all of them."""
        return " and ".join(map(str, sorted({scheme.bits for scheme in self.distinct} - set(EVERYWHERE))))


class FileFormat(ABC):
    """A format of quantized models. By default it holds integer weights of every grid and every shape."""

    suffixes: tuple[str, ...]  # of all tensors that a linear may have; the first marks a quantized one
    # Of out_features and in_features: formats that pad nothing pack whole words.
    multiples: tuple[int, int] = (1, 1)
    scale_dtype: Literal["F16"] | None = None  # None: the model's
    config_file: str | None = None  # a further file with the entry of config.json
    group_size: Literal[32] | None = None  # the only one that the format holds
    single_file: str | None = None  # that holds everything, in place of safetensors and what lies beside them
    holds_cache_scales = False  # those of a cache of keys and values
    unserved: str | None = None  # why deployments don't serve such files, and what does
    # Packages without which transformers 5.24 raises ImportError for such files (its quantizers' checks).
    transformers_needs: tuple[str, ...] = ()

    @abstractmethod
    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        """The tensors of a linear by suffix, bias excluded; `dtype` is the original weight's."""

    @abstractmethod
    def entry(self, modules: ModuleSchemes) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    def refusal(self, schemes: set[Scheme]) -> FormatRefusal | None:
        """Why the format can't hold a model of these schemes, or None."""
        other = next((scheme.name for scheme in schemes if not scheme.is_plain), None)
        if other is None:
            return None
        return FormatRefusal(
            why=f"holds integer weights alone, not {other}", nearest="the format compressed-tensors"
        )

    def model_refusal(self, model_type: str, config: Mapping[str, Any]) -> FormatRefusal | None:
        """Why the format can't hold a model of this type with this config.json, or None."""
        return None

    def dense_dtype(self, shape: tuple[int, ...], dtype: str) -> str:
        """The dtype, as safetensors names it, of a tensor of `dtype` that is not quantized."""
        return dtype

    def head_notes(self, modules: ModuleSchemes, loader: str) -> Iterator[str]:
        """A note on a quantized head that `loader` takes for missing weights."""
        if modules.head is not None:
            yield (
                f"{loader} takes no head of such files: its weights count as missing; vLLM 0.32 reads it if "
                "the vocabulary is a multiple of 64"
            )

    def shape_refusal(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Why the format can't hold a linear of this shape, or None."""
        for name, size, multiple in zip(
            ("out_features", "in_features"), (out_features, in_features), self.multiples, strict=True
        ):
            if size % multiple:
                return f"{name}={size} is not a multiple of {multiple}"
        return None

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        """Notes on files that not every loader opens."""
        yield from ()

    def scheme_in(self, entry: Mapping[str, Any], linear: str) -> Scheme | None:
        """The scheme that files with this entry of config.json have for a linear, where it tells more than
        the tensors do."""
        return None

    def cache_in(self, entry: Mapping[str, Any]) -> CacheName | None:
        """The numbers that files with this entry of config.json ask a cache of keys and values to hold."""
        return None

    def unreadable(self, entry: Mapping[str, Any]) -> str | None:
        """Why the inference server can't compute from files with this entry of config.json, or None."""
        return None


def words(values: int, bits: int) -> int:
    """int32 words for `values` integers packed densely."""
    return -(-values * bits // WORD_BITS)
