"""Keys and values on their way into a cache: observed by calibration, rounded in evaluation and serving.

An attention of transformers hands them to `update` of the cache that it is called with, after rotary
positions, and computes with what that returns. So a server that keeps FP8 computes the same as an attention
whose cache is given rounded ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from app.core.errors import ModelRefused
from app.core.formats.schemes import CACHES, CacheName
from workers.modeling.input_rounding import InputRounder, static_scale

ARGUMENTS = ("cache", "past_key_values", "past_key_value")  # names of an attention's cache, the newest first
# Keys and values (batch, heads, tokens, head size) to what is cached in their place.
OnUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheRounder:
    """The rounding of one layer's keys and values, by a scale (1,) float32 each."""

    key: InputRounder
    value: InputRounder

    @classmethod
    def of(cls, numbers: CacheName, key: Tensor, value: Tensor) -> CacheRounder:
        """By scales as files hold them, on the device of the layer."""
        rounders = (InputRounder(CACHES[numbers], each.to(torch.float32).reshape(1)) for each in (key, value))
        return cls(*rounders)

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(keys), self.value(values)


def cache_scale(numbers: CacheName, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(1,) float32: of keys or values up to the size `largest`, as files of a model of `dtype` hold it.

    Source: compressed-tensors 0.20, `calculate_qparams`: the largest size over FP8's largest number.
    """
    scale = static_scale(CACHES[numbers], largest, dtype)
    return torch.where(scale == 0, torch.finfo(dtype).tiny, scale)  # of what float16 can't hold


class CacheTap:
    """Stands before the cache that an attention is called with; None: it is called without one."""

    def __init__(self, cache: Any, on_update: OnUpdate) -> None:
        self._cache, self._on_update = cache, on_update

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._on_update(keys, values)
        if self._cache is None:
            return keys, values
        held: tuple[Tensor, Tensor] = self._cache.update(keys, values, *arguments, **named)
        return held

    def __getattr__(self, name: str) -> Any:
        return getattr(DynamicCache() if self._cache is None else self._cache, name)


def tap(attention: nn.Module, on_update: OnUpdate) -> RemovableHandle:
    """Put a CacheTap before the cache of every call.

    Raises ModelRefused for a module that takes no cache.
    """
    signature = inspect.signature(attention.forward)
    argument = next((name for name in ARGUMENTS if name in signature.parameters), None)
    if argument is None:
        raise unclear(attention, f"takes none of the arguments {', '.join(ARGUMENTS)}")

    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        call = signature.bind(*arguments, **named)
        call.arguments[argument] = CacheTap(call.arguments.get(argument), on_update)
        return call.args, call.kwargs

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def tapped(layer: nn.Module, taps: Mapping[str, OnUpdate]) -> Iterator[None]:
    """Tap these modules of `layer` while it runs."""
    hooks = [tap(layer.get_submodule(name), each) for name, each in taps.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_cache(attention: nn.Module, rounder: CacheRounder) -> None:
    """Round what a module hands to its cache from now on; `cache_rounder` of the module says how."""
    attention.cache_rounder = rounder  # type: ignore[assignment]  # a plain attribute of a module
    tap(attention, rounder)


def unclear(attention: nn.Module, why: str) -> ModelRefused:
    return ModelRefused(
        f"what {type(attention).__name__} caches is not clear: it {why}", code="kv_cache_unsupported",
        remedy="leave `kv_cache` out of the recipe", param="recipe.kv_cache",
    )  # fmt: skip
