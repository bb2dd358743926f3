"""What the host does for a call of the CUDA linear: microseconds of Python, with a driver that does nothing.

    python tests/benchmarks/launch_cost.py

The driver is a C library whose functions return at once, and tensors lie on the CPU: calls cost here what
they cost beside a GPU, but for the driver's own work and PyTorch's allocator. No GPU is needed.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from kernels.cuda import decode, driver, linear, wide  # noqa: E402
from kernels.cuda.layout import Format  # noqa: E402
from kernels.cuda.workspace import Workspace  # noqa: E402

NAMES = (
    "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2",
    "cuCtxGetCurrent", "cuFuncSetAttribute", "cuTensorMapEncodeTiled", "cuLaunchKernelEx",
)  # fmt: skip
CALLS, ROUNDS = 2000, 7


def stub_driver(folder: Path) -> driver.Driver:
    source, library = folder / "stub.c", folder / "stub.so"
    source.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in NAMES))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", str(source), "-o", str(library)], check=True)
    return driver.Driver(ctypes.CDLL(str(library)))


class StubLibrary:
    """Functions without machine code."""

    def __init__(self, device: driver.Driver) -> None:
        self.device = device

    def function(self, *_: object) -> driver.KernelFunction:
        return driver.KernelFunction(self.device, ctypes.c_void_p(1), 0)


def microseconds(x: torch.Tensor, records: torch.Tensor, rows: int, form: Format) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            linear.linear(x, records, None, rows, form)
        best = min(best, (time.thread_time() - start) / CALLS)
    return best * 1e6


def main() -> None:
    torch.set_num_threads(1)
    device = decode.Device(132, 232448)
    form = Format(4, 128, asymmetric=False, scale_dtype=torch.bfloat16)
    records = torch.zeros(1, 1, form.record_bytes, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        stub = stub_driver(Path(folder))
        held = torch.zeros(2**24, dtype=torch.uint8), torch.zeros(2**16, dtype=torch.int32)
        kernels = linear.Kernels.__new__(linear.Kernels)
        kernels.decode = decode.DecodeKernel(StubLibrary(stub), Workspace())  # type: ignore[arg-type]
        kernels.wide = wide.WideKernel(StubLibrary(stub), Workspace())  # type: ignore[arg-type]
        with (
            patch.object(linear, "kernels", lambda: kernels),
            patch.object(Workspace, "get", lambda *_: held),
            patch.object(driver, "current_stream", lambda _: 0),
            patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            patch.object(decode, "device_of", lambda *_: device),
            patch.object(wide, "device_of", lambda *_: device),
            patch("kernels.cuda.tensor_map.open_driver", lambda: stub),
        ):
            for tokens in (1, 16, 64):
                x = torch.zeros(tokens, 4096, dtype=torch.bfloat16)
                print(f"M = {tokens:3}: {microseconds(x, records, 4096, form):.1f} us a call")


if __name__ == "__main__":
    main()
