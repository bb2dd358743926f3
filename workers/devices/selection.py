"""The device of a process or thread: selected here, before anything else asks CUDA about it."""

from __future__ import annotations

import torch

from app.core.errors import DeviceFault, OutOfMemory


def select_device(name: str | torch.device) -> torch.device:
    """`cpu` or `cuda:N`, ready: CUDA is initialised, and the GPU is this thread's current one.

    PyTorch initialises CUDA with the first tensor, and some of its functions fail before. The current GPU
    belongs to a thread and is the first one until it is set: kernels of Triton, pinned memory and questions
    about graphs go there. Costs nothing when it is called again.

    Raises DeviceFault if there is no such device or PyTorch can't use it, OutOfMemory if the GPU is full.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.set_device(device)
    except (AssertionError, RuntimeError) as fault:  # an assertion: PyTorch is built without CUDA
        reason = str(fault).partition("\n")[0]
        if "out of memory" in reason:
            remedy = "end what else runs on this GPU, or use another one"
            raise OutOfMemory(f"{name} has no memory left: {reason}", remedy=remedy) from fault
        raise DeviceFault(
            f"{name} can't be used: {reason}", remedy="`nibble doctor` on this host lists the devices"
        ) from fault
    return device
