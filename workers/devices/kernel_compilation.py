"""`python -m workers.devices.kernel_compilation`: compiles the usual CUDA kernels into the user's cache.

For the GPUs that are here, or for all architectures where there is none, as while an image is built. Prints
a JSON line for each kernel as it is ready; the last has the compiler and the kernels of each architecture,
or the error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from kernels.cuda.compiler import CompileError, architecture_for
from kernels.cuda.cubin_cache import CubinCache
from kernels.cuda.standard_kernels import DEVICES, compile_each
from workers.devices.torch_process import leave


def architectures() -> list[str]:
    """Of the GPUs that are here; all where there is none."""
    if not torch.cuda.is_available():
        return list(DEVICES)
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return sorted({name for name in map(architecture_for, capabilities) if name is not None})


def say(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def compiled(cache: CubinCache) -> dict[str, Any]:
    compiler = cache.compiler
    kernels: dict[str, int] = {}
    if compiler is None:
        return {"error": "neither nvcc nor the NVRTC library was found"}
    try:
        threads = len(os.sched_getaffinity(0))
        for architecture in architectures():
            for kernel in compile_each(architecture, cache, threads):
                kernels[architecture] = kernel.of
                say(kernel._asdict())
    except (CompileError, OSError) as fault:
        return {"error": str(fault).partition("\n")[0]}
    return {"compiler": compiler.version, "folder": str(cache.folder), "kernels": kernels}


def main() -> int:
    say(compiled(CubinCache()))
    return 0


if __name__ == "__main__":
    leave(main())
