"""Kernels by source and name: compiled or read from the cache, loaded once for each device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping

import torch

from kernels.cuda.compiler import architecture_for
from kernels.cuda.cubin_cache import CubinCache
from kernels.cuda.driver import KernelFunction, Module

Defines = Mapping[str, int | str]


class Library:
    """The kernels of kernels/csrc/cuda on the devices of this process."""

    def __init__(self, cache: CubinCache | None = None) -> None:
        self.cache = cache or CubinCache()
        self.functions: dict[tuple[object, ...], KernelFunction] = {}
        self.modules: dict[tuple[object, ...], Module] = {}
        self.lock = threading.Lock()

    def function(self, source: str, name: str, device: int, defines: Defines | None = None) -> KernelFunction:
        """The kernel `name` of `source`, compiled with `defines` for this device.

        Raises ValueError for a device that no machine code of ours runs on.
        """
        words = tuple(sorted((defines or {}).items()))
        loaded = self.functions.get((source, name, device, words))
        if loaded is not None:
            return loaded
        with self.lock:
            module = self._module(source, device, words)
            return self.functions.setdefault((source, name, device, words), module.function(name))

    def _module(self, source: str, device: int, words: tuple[tuple[str, int | str], ...]) -> Module:
        key = (source, device, words)
        if key not in self.modules:
            capability = torch.cuda.get_device_capability(device)
            architecture = architecture_for(capability)
            if architecture is None:
                raise ValueError(f"cuda:{device} has compute capability {capability}: no kernel runs there")
            self.modules[key] = Module(self.cache.get(source, architecture, dict(words)).code, device)
        return self.modules[key]


@functools.cache
def shared_library() -> Library:
    """The process's kernels, with the cache in the user's cache folder."""
    return Library()
