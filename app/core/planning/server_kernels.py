"""Which scheme a server multiplies on which device, and how: the one table of it.

Read in vLLM 0.33.0 (`compressed_tensors.py`, its `schemes`, `kernels/linear`: the order in which kernels are
tried, what each asks for; that int8 is refused from 10.0 on stands in its compiled library; of CUTLASS's FP8
in blocks the capabilities are those of its C++ sources) and SGLang 0.5.23 (`compressed_tensors.py` and its
`schemes`), with linears of dense models as compressed-tensors files hold them. CPU: what vLLM 0.32.0's CPU
build ran and refused in our judges. Nothing here was run on a GPU. SGLang on AMD GPUs and CPUs: not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES
from app.core.planning.serving_devices import Platform, ServingDevice
from app.core.records.specs import Frozen

Server = Literal["vLLM 0.33.0", "SGLang 0.5.23"]
# numbers: products of the scheme's own numbers; weights: the inputs stay as they are, weights are converted
# while they are multiplied; emulated: dequantized first; none: the server refuses the files
Use = Literal["numbers", "weights", "emulated", "none", "not read"]
Since = tuple[tuple[float, Use], ...]  # from which compute capability on, in rising order

W_FROM_75: Since = ((7.5, "weights"),)
W_FROM_80: Since = ((8.0, "weights"),)
NONE: Since = ((0.0, "none"),)
FP8_BY_CUTLASS: Since = ((7.5, "weights"), (8.9, "numbers"))
INT8: Since = ((7.5, "numbers"), (10.0, "none"))
TABLE: Mapping[Server, Mapping[Platform, Mapping[str, Since]]] = {
    "vLLM 0.33.0": {
        "cuda": {
            **dict.fromkeys(("w2a16", "w3a16", "w4a16", "w8a16", "nvfp4a16"), W_FROM_75),
            "w4a8": ((9.0, "numbers"), (9.1, "none")),
            "w8a8": INT8,
            "w8a8-static": INT8,
            "fp8": FP8_BY_CUTLASS,
            "fp8-static": FP8_BY_CUTLASS,
            "fp8-block": ((7.5, "weights"), (9.0, "numbers")),
            "nvfp4": ((7.5, "weights"), (10.0, "numbers")),
            "mxfp4": ((8.0, "weights"), (10.0, "numbers")),
            # its class of mxfp4 does not look at whether the file has inputs rounded
            "mxfp4a16": ((8.0, "weights"), (10.0, "numbers")),
        },
        "rocm": {
            **dict.fromkeys(("w2a16", "w3a16", "w8a16", "w4a8"), NONE),
            "w4a16": ((0.0, "weights"),),
            **dict.fromkeys(("w8a8", "w8a8-static", "fp8", "fp8-static", "fp8-block"), ((0.0, "numbers"),)),
            **dict.fromkeys(("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"), ((0.0, "emulated"),)),
        },
        "cpu": {
            **dict.fromkeys(("w2a16", "w3a16", "w8a16", "w4a8", "fp8-block"), NONE),
            **dict.fromkeys(("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"), NONE),
            "w4a16": ((0.0, "weights"),),
            **dict.fromkeys(("w8a8", "w8a8-static", "fp8", "fp8-static"), ((0.0, "numbers"),)),
        },
    },
    "SGLang 0.5.23": {
        "cuda": {
            **dict.fromkeys(("w2a16", "w3a16", "w4a8", "mxfp4", "mxfp4a16"), NONE),
            **dict.fromkeys(("w4a16", "w8a16", "nvfp4a16"), W_FROM_80),
            **dict.fromkeys(("w8a8", "w8a8-static"), ((8.0, "numbers"), (10.0, "not read"))),
            **dict.fromkeys(("fp8", "fp8-static"), ((8.0, "weights"), (8.9, "numbers"))),
            "fp8-block": ((8.9, "numbers"),),
            "nvfp4": ((8.0, "weights"), (10.0, "numbers")),
        },
        "rocm": {},
        "cpu": {},
    },
}  # fmt: skip
SERVERS: tuple[Server, ...] = get_args(Server)
USE_TEXT: Mapping[Use, str] = {
    "numbers": "multiplies its own numbers",
    "weights": "reads its weights alone",
    "emulated": "has no kernel and dequantizes first",
    "none": "has no kernel",
    "not read": "was not looked at",
}


class ServerKernel(Frozen):
    """What a server does with a scheme on a device."""

    server: Server
    use: Use


def row_of(scheme: Scheme) -> str:
    """The scheme's row of the table: that of integers for weights alone names their bits."""
    return f"w{scheme.bits}a16" if scheme.is_plain else scheme.name


def kernels(scheme: Scheme, device: ServingDevice) -> tuple[ServerKernel, ...]:
    """What every server does with it there."""
    return tuple(ServerKernel(server=server, use=use_of(server, scheme, device)) for server in SERVERS)


def use_of(server: Server, scheme: Scheme, device: ServingDevice) -> Use:
    """What the server does with the scheme on the device."""
    rows = TABLE[server][device.platform]
    since = rows.get(row_of(scheme))
    if since is None:
        return "not read"
    return next((use for lowest, use in reversed(since) if device.capability >= lowest), "none")


def best_use(scheme: Scheme, device: ServingDevice) -> Use:
    """The best that any server does with it there."""
    order: tuple[Use, ...] = ("numbers", "weights", "emulated", "none", "not read")
    return min((kernel.use for kernel in kernels(scheme, device)), key=order.index)


def rounds_inputs(scheme: Scheme, use: Use) -> bool:
    """Whether products are of rounded inputs, as the scheme says, or as the server does it nevertheless."""
    return use == "numbers" and (SCHEMES[scheme.name].inputs is not None or scheme.name == "mxfp4a16")
