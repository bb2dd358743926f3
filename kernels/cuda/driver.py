"""Loads cubins and launches kernels through the CUDA driver's C interface, which is stable across versions.

PyTorch owns the context, the memory and the streams; this module adds launches to them.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_BYTES_OF_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
PROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
DEFAULT_SHARED_BYTES = 48 * 1024

Argument = torch.Tensor | int | float | ctypes.Structure | None
Grid = tuple[int, int, int]
CValue = Any  # a ctypes value: of a structure, a pointer, an integer or a float


class DriverError(RuntimeError):
    """The CUDA driver returned an error."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value in a union of 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int * 16),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class Driver:
    """The driver's library, each call's status checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.functions: dict[str, Callable[..., int]] = {}  # looking one up in the library makes it anew
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Calls `name`. Raises DriverError, with the driver's name and text of the error."""
        function = self.functions.get(name)
        if function is None:
            function = self.functions[name] = self.library[name]
        status = function(*arguments)
        if status:
            error, text = ctypes.c_char_p(), ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(error))
            self.library.cuGetErrorString(status, ctypes.byref(text))
            description = f"{(error.value or b'unknown').decode()}: {(text.value or b'').decode()}"
            raise DriverError(f"{name} failed with {status} ({description})")

    @functools.lru_cache  # noqa: B019 - one driver lives as long as the process
    def context(self, device: int) -> ctypes.c_void_p:
        """The device's primary context: the one that PyTorch uses."""
        context, handle = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return context

    def attribute(self, number: int, device: int) -> int:
        """A CUdevice_attribute of the device."""
        value, handle = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        return value.value

    def is_on(self, device: int) -> bool:
        """Whether the device's context is current in this thread."""
        current = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(current))
        return current.value == self.context(device).value

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Makes the device's context current in this thread, and puts the former back."""
        self.call("cuCtxPushCurrent_v2", self.context(device))
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def open_driver() -> Driver:
    """The process's driver. Raises DriverError where there is none."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise DriverError(f"no NVIDIA driver: {error}") from error


@dataclass(frozen=True)
class KernelLaunch:
    """How many blocks of how many threads, and each block's dynamic shared memory.

    `overlap`: the kernel may start before the previous one on its stream has ended; it must then execute
    griddepcontrol.wait before it touches what others write.
    """

    grid: Grid
    block: Grid
    shared_bytes: int = 0
    overlap: bool = False


class Packed(threading.local):
    """A thread's own C values of a kernel's arguments, and of its launch: filled anew for each call."""

    def __init__(self) -> None:
        self.values: list[CValue] = []
        self.pointers: ctypes.Array[ctypes.c_void_p] = (ctypes.c_void_p * 0)()
        self.launch: KernelLaunch | None = None
        self.config = LaunchConfig()

    def fill(self, arguments: Sequence[Argument]) -> None:
        """A kernel's parameters have the same types in every call."""
        if len(self.values) != len(arguments):
            self.values = [as_c(argument) for argument in arguments]
            self.pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, self.values))
            return
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self.values[index].value = argument.data_ptr()
            elif isinstance(argument, ctypes.Structure):
                self.values[index] = argument
                self.pointers[index] = ctypes.addressof(argument)
            else:
                self.values[index].value = argument


class KernelFunction:
    """A kernel of a loaded module."""

    def __init__(self, driver: Driver, handle: ctypes.c_void_p, device: int) -> None:
        self.driver = driver
        self.handle = handle
        self.device = device
        self.shared_limit = DEFAULT_SHARED_BYTES
        self.overlap = Attribute(OVERLAP, 0, (ctypes.c_int * 16)(1))
        self.packed = Packed()

    def __call__(self, launch: KernelLaunch, arguments: Sequence[Argument]) -> None:
        """Adds the kernel to PyTorch's current stream: tensors go as pointers, integers as 32 bits, floats as
        float32, None as a null pointer, structures by value."""
        packed = self.packed
        packed.fill(arguments)
        if packed.launch is not launch:
            attributes = ctypes.pointer(self.overlap) if launch.overlap else None
            packed.config = LaunchConfig(
                launch.grid, launch.block, launch.shared_bytes, None, attributes, int(launch.overlap)
            )
            packed.launch = launch
        packed.config.stream = current_stream(self.device)
        if self.driver.is_on(self.device):
            self.start(packed)
        else:
            with self.driver.on(self.device):
                self.start(packed)

    def start(self, packed: Packed) -> None:
        self.allow_shared(packed.config.shared_bytes)
        self.driver.call("cuLaunchKernelEx", ctypes.byref(packed.config), self.handle, packed.pointers, None)

    def allow_shared(self, count: int) -> None:
        """Raises the limit of dynamic shared memory to `count` bytes, once."""
        if count > self.shared_limit:
            self.driver.call("cuFuncSetAttribute", self.handle, MAX_DYNAMIC_SHARED, count)
            self.shared_limit = count


class Module:
    """A cubin on one device."""

    def __init__(self, code: bytes, device: int) -> None:
        self.driver = open_driver()
        self.device = device
        self.handle = ctypes.c_void_p()
        with self.driver.on(device):
            self.driver.call("cuModuleLoadData", ctypes.byref(self.handle), code)

    def function(self, name: str) -> KernelFunction:
        """The kernel declared extern "C" under `name`."""
        handle = ctypes.c_void_p()
        with self.driver.on(self.device):
            self.driver.call("cuModuleGetFunction", ctypes.byref(handle), self.handle, name.encode())
        return KernelFunction(self.driver, handle, self.device)


def current_stream(device: int) -> int:
    """The handle of PyTorch's current stream, as the code asks for it that torch.compile writes."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def as_c(argument: Argument) -> CValue:
    """A kernel's argument as the C value whose address the driver wants."""
    if isinstance(argument, ctypes.Structure):
        return argument
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)
