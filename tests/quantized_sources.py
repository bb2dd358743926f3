"""Models in the layouts in which others publish quantized weights, made of plain ones.

Written after the public descriptions of the layouts and by none of our own code: DeepSeek-V3's FP8 in blocks,
the OCP Microscaling formats, gpt-oss' tensors, compressed-tensors' naive layouts, ModelOpt's NVFP4.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
LARGEST_FP8, LARGEST_FP4 = 448.0, 6.0
BLOCK = 128
WEIGHTS = "model.safetensors"

Stored = dict[str, Tensor]
Quantize = Callable[[str, Tensor], Stored]


def write_source(plain: Path, folder: Path, entry: dict[str, object], quantize: Quantize) -> Path:
    """The model in `plain` with its linears' weights, the head's excepted, as `quantize` stores them."""
    shutil.copytree(plain, folder)
    tensors: Stored = {}
    for name, value in load_file(folder / WEIGHTS).items():
        tensors |= quantize(name, value) if is_linear(name, value) else {name: value}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return with_config(folder, quantization_config=entry)


def with_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def is_linear(name: str, value: Tensor) -> bool:
    return value.dim() == 2 and "_proj" in name and name.endswith(".weight")


def fp8_block(name: str, weight: Tensor) -> Stored:
    """Blocks of 128 x 128, the last of a row or column cut; scales are multiplied."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST_FP8).clamp(min=1e-12)
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return {name: codes.contiguous().to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def fp8_source(plain: Path, folder: Path) -> Path:
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return write_source(plain, folder, entry, fp8_block)


def nearest_fp4(values: Tensor) -> Tensor:
    """uint8 codes."""
    codes = (values.abs()[..., None] - FP4[:8]).abs().argmin(-1).to(torch.uint8)
    return codes + 8 * (values < 0).to(torch.uint8)


def in_bytes(codes: Tensor) -> Tensor:
    """The first of two in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(…, groups, 16) bytes and (…, groups) exponents of (…, columns) weights."""
    groups = weight.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=2**-100)
    exponent = torch.ceil(torch.log2(largest / LARGEST_FP4))
    codes = nearest_fp4(groups / torch.exp2(exponent)[..., None])
    return in_bytes(codes), (exponent + 127).to(torch.uint8)


def blocks_and_scales(name: str, weight: Tensor) -> Stored:
    """As gpt-oss has them; `weight` is (…, out, in)."""
    blocks, scales = mxfp4(weight)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def mxfp4_source(plain: Path, folder: Path) -> Path:
    return write_source(plain, folder, {"quant_method": "mxfp4"}, blocks_and_scales)


def gpt_oss_source(plain: Path, folder: Path) -> Path:
    """Of a gpt-oss, whose files have the experts of a layer as (experts, in, out)."""
    shutil.copytree(plain, folder)
    tensors: Stored = {}
    for name, value in load_file(folder / WEIGHTS).items():
        is_expert = value.dim() == 3
        tensors |= blocks_and_scales(name, value.transpose(1, 2)) if is_expert else {name: value}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return with_config(folder, quantization_config=entry)


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, FP8 scales of groups of 16, and the number that multiplies these."""
    groups = weight.float().unflatten(-1, (-1, 16))
    factor = (groups.abs().max() / LARGEST_FP4 / LARGEST_FP8).view(1)
    scales = (groups.abs().amax(-1) / LARGEST_FP4 / factor).to(torch.float8_e4m3fn)
    sizes = (scales.float() * factor).clamp(min=1e-12)
    return in_bytes(nearest_fp4(groups / sizes[..., None])).flatten(-2), scales, factor


def modelopt_source(plain: Path, folder: Path) -> Path:
    def quantize(name: str, weight: Tensor) -> Stored:
        codes, scales, factor = nvfp4(weight)
        scale = f"{name}_scale"
        unused = {name.replace("weight", "input_scale"): torch.ones(1)}
        return {name: codes, scale: scales, f"{scale}_2": factor.view(()), **unused}

    entry = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return write_source(plain, folder, entry, quantize)
