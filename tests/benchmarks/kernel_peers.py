"""Other people's kernels for kernels.py: each takes our canonical weight, or says why it can't.

None is a dependency of Nibble. Where a library is not installed its candidate is left out, and named.

- tinygemm: in every CUDA build of PyTorch.
- humming (humming-kernels), gemlite, conch (conch-triton-kernels): from the package index, with
  `pip install --no-deps`; they need triton. gemlite wants a GPU already when it is imported.
- marlin: built from GPTQModel's sources, which its source package holds: `pip download --no-deps gptqmodel`,
  unpack, and name the folder in MARLIN_SOURCE. Needs nvcc, ninja, a CUDA build of PyTorch, and minutes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import layouts, operators
from kernels.weight import PackedWeight

Product = Callable[[Tensor], Tensor]
Peer = Callable[[PackedWeight], Product]


def q_values(weight: PackedWeight) -> Tensor:
    return layouts.unpack_rows(weight.qweight, weight.bits, weight.in_features)


def needs(condition: bool, what: str) -> None:
    """Raises ValueError with what a peer takes."""
    if not condition:
        raise ValueError(f"it takes {what}")


def tinygemm(weight: PackedWeight) -> Product:
    """aten::_weight_int4pack_mm: w = (q - 8) * scale + offset in bfloat16."""
    needs(weight.bits == 4 and weight.group_size != -1, "4 bits with groups")
    q = q_values(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    zero = torch.full_like(weight.scale, 8) if weight.zero is None else weight.zero
    offset = (8 - zero.float()) * weight.scale.float()
    scales = torch.stack((weight.scale.float(), offset), dim=-1).transpose(0, 1).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, scales)


def humming(weight: PackedWeight) -> Product:
    """The library humming-kernels: its layer with our codes."""
    needs(weight.zero is None, "symmetric weights, as it is set up here")
    config = {
        "dtype": f"uint{weight.bits}",
        "group_size": 0 if weight.group_size == -1 else weight.group_size,
    }
    layer = importlib.import_module("humming.layer").HummingLayer(
        shape_n=weight.out_features, shape_k=weight.in_features, weight_config=config,
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_tensors({"weight": weight.qweight, "weight_scale": weight.scale.bfloat16()})
    layer.transform()
    return lambda x: layer(x)  # type: ignore[no-any-return]


def gemlite(weight: PackedWeight) -> Product:
    """GemLite's Triton layer: w = (q - zero) * scale, with its tuned shapes for the device if it has any."""
    needs(weight.bits in (2, 4, 8), "2, 4 or 8 bits")
    core = importlib.import_module("gemlite.core")
    name = {torch.bfloat16: "BF16", torch.float16: "FP16"}[weight.scale.dtype]
    dtype = getattr(core.DType, name)
    layer = core.GemLiteLinearTriton(
        W_nbits=weight.bits, group_size=weight.channels_per_group, in_features=weight.in_features,
        out_features=weight.out_features, input_dtype=dtype, output_dtype=dtype,
    )  # fmt: skip
    zero: Tensor | int = 2 ** (weight.bits - 1)
    if weight.zero is not None:
        zero = weight.zero.to(weight.scale.dtype)
    layer.pack(q_values(weight), weight.scale, zero, None, fma_mode=False)
    return lambda x: layer(x)  # type: ignore[no-any-return]


def conch(weight: PackedWeight) -> Product:
    """Conch's Triton product: codes packed down the channels; scales, zero points (groups, out_features)."""
    needs(weight.bits in (2, 4, 8), "2, 4 or 8 bits")
    gemm = importlib.import_module("conch.ops.quantization.gemm").mixed_precision_gemm
    packed = operators.pack(q_values(weight).T.contiguous(), weight.bits, down=True)
    scale = weight.scale.T.contiguous()
    zero = None if weight.zero is None else weight.zero.T.to(scale.dtype).contiguous()
    bias = 2 ** (weight.bits - 1) if zero is None else 0
    group = weight.channels_per_group
    return lambda x: gemm(x, packed, scale, zero, weight.bits, bias, group)  # type: ignore[no-any-return]


# -------------------- Marlin

MARLIN_SOURCE = "MARLIN_SOURCE"  # the environment variable that names GPTQModel's unpacked source package
MARLIN_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-static-global-template-stub=false")
# Column j of a line of 64 scales, and of 32 where there is one group, as Marlin's fragments want them.
MARLIN_SCALES = tuple(i + 8 * j for i in range(8) for j in range(8))
MARLIN_SCALES_OF_ROWS = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))


def marlin_folder() -> Path:
    """Raises ImportError if no sources are at hand."""
    named = os.environ.get(MARLIN_SOURCE)
    if not named:
        raise ImportError(f"{MARLIN_SOURCE} does not name the folder of GPTQModel's source package")
    folder = Path(named) / "gptqmodel_ext" / "marlin"
    if not folder.is_dir():
        raise ImportError(f"{MARLIN_SOURCE}={named}: there is no {folder}")
    return folder


def marlin_sources(folder: Path) -> list[str]:
    """Of the bfloat16 kernels for codes with a fixed zero point; generated where they are not."""
    subprocess.run([sys.executable, str(folder / "generate_kernels.py")], cwd=folder, check=True)
    names = ("marlin_torch_bf16.cpp", "gptq_marlin_bf16.cu", "gptq_marlin_repack.cu", "awq_marlin_repack.cu")
    generated = sorted(folder.glob("kernel_bf16_*.cu"))
    return [*(str(folder / name) for name in names), *map(str, generated)]


@functools.cache
def marlin_operators() -> Any:
    """torch.ops of the built extension."""
    from torch.utils import cpp_extension  # here: it looks for a toolkit when it is imported

    folder = marlin_folder()
    cpp_extension.load(
        "gptqmodel_marlin_bf16", marlin_sources(folder), extra_include_paths=[str(folder)],
        extra_cflags=["-O3", "-std=c++17"], extra_cuda_cflags=list(MARLIN_FLAGS), is_python_module=False,
    )  # fmt: skip
    return torch.ops.gptqmodel_marlin_bf16


def marlin_type(folder: Path, bits: int) -> int:
    """The number under which the kernels know codes of `bits` bits with a zero point in their middle."""
    path = folder.parents[1] / "gptqmodel" / "utils" / "marlin_scalar_type.py"
    spec = importlib.util.spec_from_file_location("marlin_scalar_type", path)
    assert spec is not None
    assert spec.loader is not None
    module = ModuleType(spec.name)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    number: int = module.ScalarType.uint(bits, 2 ** (bits - 1)).id
    return number


def marlin_scales(scale: Tensor) -> Tensor:
    """(out_features, groups) to (groups, out_features) in the order of the fragments."""
    order = MARLIN_SCALES if scale.shape[1] > 1 else MARLIN_SCALES_OF_ROWS
    lines = scale.T.reshape(-1, len(order))[:, list(order)]
    return lines.reshape(scale.shape[1], scale.shape[0]).contiguous()


def marlin(weight: PackedWeight) -> Product:
    """GPTQModel's Marlin in bfloat16, sums of blocks in float32."""
    needs(weight.zero is None and weight.bits in (4, 8), "symmetric weights of 4 or 8 bits")
    rows, channels, device = weight.out_features, weight.in_features, weight.qweight.device
    ops, number = marlin_operators(), marlin_type(marlin_folder(), weight.bits)
    none = torch.empty(0, dtype=torch.int32, device=device)
    down = operators.pack(q_values(weight).T.contiguous(), weight.bits, down=True)
    packed = ops.gptq_marlin_repack(down, none, channels, rows, weight.bits)
    scales = marlin_scales(weight.scale.bfloat16())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    locks = torch.zeros(max(processors, 128), dtype=torch.int32, device=device)
    return lambda x: ops.gptq_marlin_gemm_bf16(  # type: ignore[no-any-return]
        x, None, packed, None, scales, None, none, none, none, locks, number, x.shape[0], rows, channels,
        True, False, True, False, None, None,
    )  # fmt: skip


PEERS: dict[str, Peer] = {
    "tinygemm": tinygemm, "humming": humming, "gemlite": gemlite, "conch": conch, "marlin": marlin
}  # fmt: skip


def peers(weight: PackedWeight, names: list[str]) -> list[tuple[str, Callable[[], Product]]]:
    """Those of `names` that can be made here: each with a function that makes a further copy."""
    found: list[tuple[str, Callable[[], Product]]] = []
    on_gpu = weight.to(torch.device("cuda"))
    for name in names:
        try:
            PEERS[name](on_gpu)(torch.randn(1, weight.in_features, device="cuda", dtype=torch.bfloat16))
        except Exception as fault:  # noqa: BLE001 - another's library: whatever it raises, the rest is measured
            print(f"# {name}: {type(fault).__name__}: {str(fault)[:300]}")
            continue
        found.append((name, functools.partial(PEERS[name], on_gpu)))
    return found
