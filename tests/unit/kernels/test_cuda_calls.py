"""Launches through a driver that only writes down what it is given: arguments, stream, context."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cuda import decode, driver, tensor_map, wide
from kernels.cuda.calls import LinearKernel
from kernels.cuda.decode import Device
from kernels.cuda.driver import Driver, KernelFunction, KernelLaunch
from kernels.cuda.layout import Format
from kernels.cuda.workspace import Workspace

CONTEXT, STREAM, HANDLE = 77, 4242, 5
FORM = Format(4, 128, asymmetric=False, scale_dtype=torch.bfloat16)


class WritingLibrary:
    """The driver's C interface."""

    def __init__(self) -> None:
        self.current = 0
        self.calls: list[str] = []
        self.looked_up: list[str] = []
        self.launches: list[tuple[Any, list[int]]] = []  # configuration, addresses of the arguments

    def __getitem__(self, name: str) -> Callable[..., int]:
        self.looked_up.append(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuDevicePrimaryCtxRetain":
                arguments[0]._obj.value = CONTEXT
            elif name == "cuCtxGetCurrent":
                arguments[0]._obj.value = self.current
            elif name == "cuLaunchKernelEx":
                config, handle, pointers, _ = arguments
                assert handle.value == HANDLE
                self.launches.append((config._obj, list(pointers)))
            return 0

        return call


@pytest.fixture
def library() -> WritingLibrary:
    return WritingLibrary()


@pytest.fixture
def function(library: WritingLibrary, monkeypatch: pytest.MonkeyPatch) -> KernelFunction:
    monkeypatch.setattr(driver, "current_stream", lambda device: STREAM + device)
    made = Driver(library)  # type: ignore[arg-type]
    monkeypatch.setattr(tensor_map, "open_driver", lambda: made)
    tensor_map.description.cache_clear()
    return KernelFunction(made, ctypes.c_void_p(HANDLE), 1)


def integer(address: int) -> int:
    return ctypes.c_int.from_address(address).value


def pointer(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value


def test_every_call_gives_its_own_arguments(library: WritingLibrary, function: KernelFunction) -> None:
    launch = KernelLaunch((3, 2, 1), (64, 1, 1), 50 * 1024, overlap=True)
    first, second = torch.zeros(4), torch.ones(4)
    for tensors, number, factor in (((first, None), 7, 0.5), ((second, first), -9, 2.0)):
        function(launch, (*tensors, number, factor))
        config, places = library.launches[-1]
        expected = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        assert [pointer(place) for place in places[:2]] == expected
        assert integer(places[2]) == number
        assert ctypes.c_float.from_address(places[3]).value == factor
        assert (list(config.grid), list(config.block), config.shared_bytes) == ([3, 2, 1], [64, 1, 1], 51200)
        assert config.stream == STREAM + 1
        assert config.attribute_count == 1
        assert config.attributes[0].id == driver.OVERLAP
    function(KernelLaunch((9, 1, 1), (32, 1, 1)), (first, None, 1, 1.0))
    config, _ = library.launches[-1]
    assert (config.grid[0], config.shared_bytes, config.attribute_count) == (9, 0, 0)
    assert library.calls.count("cuFuncSetAttribute") == 1


def test_the_context_is_pushed_only_where_another_is_current(
    library: WritingLibrary, function: KernelFunction
) -> None:
    launch = KernelLaunch((1, 1, 1), (32, 1, 1))
    function(launch, (1,))
    assert library.calls[-3:] == ["cuCtxPushCurrent_v2", "cuLaunchKernelEx", "cuCtxPopCurrent_v2"]
    library.current = CONTEXT
    del library.calls[:]
    function(launch, (2,))
    assert library.calls == ["cuCtxGetCurrent", "cuLaunchKernelEx"]
    assert len(library.looked_up) == len(set(library.looked_up))


def test_threads_do_not_share_arguments(library: WritingLibrary, function: KernelFunction) -> None:
    launch = KernelLaunch((1, 1, 1), (32, 1, 1))
    function(launch, (1,))
    other = threading.Thread(target=function, args=(launch, (2,)))
    other.start()
    other.join()
    (_, mine), (_, theirs) = library.launches
    assert mine != theirs
    assert integer(mine[0]) == 1


class OneFunction:
    """A library whose only kernel is `function`."""

    def __init__(self, function: KernelFunction) -> None:
        self.kernel = function
        self.asked = 0

    def function(self, *_: object) -> KernelFunction:
        self.asked += 1
        return self.kernel


@pytest.mark.parametrize(("module", "tokens", "last"), [(decode, 3, []), (wide, 40, [0])])
def test_a_product_is_prepared_once(
    library: WritingLibrary, function: KernelFunction, monkeypatch: pytest.MonkeyPatch,
    module: Any, tokens: int, last: list[int],
) -> None:  # fmt: skip
    held = torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(Workspace, "get", lambda *_: held)
    monkeypatch.setattr(module, "device_of", lambda _: Device(132, 232448))
    monkeypatch.setattr(decode, "hopper", lambda _: True)
    only = OneFunction(function)
    kernel: LinearKernel = {decode: decode.DecodeKernel, wide: wide.WideKernel}[module](only, Workspace())  # type: ignore[arg-type]
    records = torch.zeros(1, 1, FORM.record_bytes, dtype=torch.uint8)
    bias = torch.zeros(8192, dtype=torch.bfloat16)
    for added in (bias, None):
        x, output = (
            torch.zeros(tokens, 256, dtype=torch.bfloat16),
            torch.zeros(tokens, 8192, dtype=torch.bfloat16),
        )
        kernel(x, records, added, output, FORM)
        _, places = library.launches[-1]
        tensors: list[Tensor | None] = [records, x] if module is decode else [records]
        tensors += [added, output, *held]
        found = places if module is decode else places[1:]  # the first is the description of x
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        assert [pointer(place) for place in found[: len(tensors)]] == addresses
        assert [integer(place) for place in found[len(tensors) :]] == [tokens, 256, 8192, *last]
    assert only.asked == 1
