"""The benchmark's peers without a GPU: what they are given means our weight, and what is absent is said."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import layouts, reference
from kernels.weight import PackedWeight
from tests.benchmarks import kernel_peers
from tests.unit.kernels.weights import random_weight


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A library of that name, and the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(content)


def check(product: kernel_peers.Product, weight: PackedWeight) -> None:
    x = torch.randn(3, weight.in_features, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(product(x), reference.quantized_linear(x, weight, None))


@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"), [(4, 64, False), (2, 32, True), (8, -1, False), (8, 64, True)]
)
def test_conch_is_given_our_weight(
    monkeypatch: pytest.MonkeyPatch, bits: int, group: int, *, asymmetric: bool
) -> None:
    """The arguments as its own product reads them (conch/kernels/quantization/gemm.py)."""

    def gemm(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *numbers: int) -> Tensor:
        width, bias, size = numbers
        assert packed.is_contiguous()
        codes = layouts.unpack_gptq(packed, width, x.shape[1]).double() - bias
        scales, zeros = (
            None if part is None else part.double().repeat_interleave(size, dim=0) for part in (scale, zero)
        )
        assert scales is not None
        return x @ ((codes if zeros is None else codes - zeros) * scales)

    module(monkeypatch, "conch.ops.quantization.gemm", mixed_precision_gemm=gemm)
    weight = random_weight(24, 128, bits=bits, group_size=group, asymmetric=asymmetric)
    check(kernel_peers.conch(weight), weight)


@pytest.mark.parametrize(("bits", "group", "asymmetric"), [(4, 64, False), (2, 32, True), (8, -1, False)])
def test_gemlite_is_given_our_weight(
    monkeypatch: pytest.MonkeyPatch, bits: int, group: int, *, asymmetric: bool
) -> None:
    """As gemlite/core.py reads them: w = (q - zeros) * scales without its fused form."""

    class Layer:
        def __init__(self, **sizes: Any) -> None:
            self.sizes = sizes

        def pack(self, q: Tensor, scale: Tensor, zero: Tensor | int, bias: None, *, fma_mode: bool) -> None:
            assert not fma_mode
            assert q.dtype == torch.uint8
            group = self.sizes["group_size"]
            zeros = (zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)).double()
            factors = scale.double().repeat_interleave(group, dim=1)
            self.dense = (q.double() - zeros.repeat_interleave(group, dim=1)) * factors

        def __call__(self, x: Tensor) -> Tensor:
            assert self.sizes["W_nbits"] == bits
            assert (self.sizes["in_features"], self.sizes["out_features"]) == (128, 24)
            return x @ self.dense.T

    types = SimpleNamespace(BF16="bf16", FP16="fp16")
    module(monkeypatch, "gemlite.core", GemLiteLinearTriton=Layer, DType=types)
    weight = random_weight(24, 128, bits=bits, group_size=group, asymmetric=asymmetric)
    check(kernel_peers.gemlite(weight), weight)


def test_marlins_scales_are_permuted_as_its_own_code_permutes_them() -> None:
    """`get_scale_perms` of vLLM's and GPTQModel's marlin utilities, worked out for two columns."""
    scale = torch.arange(128.0).view(1, 128).expand(2, 128).T.contiguous()  # (out_features, 2 groups)
    found = kernel_peers.marlin_scales(scale)
    assert found.shape == (2, 128)
    assert found[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert found[1, 64:68].tolist() == [64, 72, 80, 88]
    whole = kernel_peers.marlin_scales(scale[:, :1])
    assert whole[0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]


def test_marlin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(kernel_peers.MARLIN_SOURCE, raising=False)
    with pytest.raises(ImportError, match="MARLIN_SOURCE does not name the folder"):
        kernel_peers.marlin_folder()
    monkeypatch.setenv(kernel_peers.MARLIN_SOURCE, str(tmp_path))
    with pytest.raises(ImportError, match=r"there is no .*gptqmodel_ext/marlin"):
        kernel_peers.marlin_folder()


def test_marlins_sources_and_type_come_from_its_package(tmp_path: Path) -> None:
    folder, types = tmp_path / "gptqmodel_ext" / "marlin", tmp_path / "gptqmodel" / "utils"
    folder.mkdir(parents=True)
    types.mkdir(parents=True)
    generator = "from pathlib import Path\nPath('kernel_bf16_ku4b8.cu').touch()\n"
    (folder / "generate_kernels.py").write_text(generator)
    (types / "marlin_scalar_type.py").write_text(
        "class ScalarType:\n    @classmethod\n    def uint(cls, bits, bias):\n"
        "        found = cls()\n        found.id = bits * 1000 + bias\n        return found\n"
    )
    names = [Path(source).name for source in kernel_peers.marlin_sources(folder)]
    assert names[-1] == "kernel_bf16_ku4b8.cu"
    assert "gptq_marlin_bf16.cu" in names
    assert kernel_peers.marlin_type(folder, 4) == 4008


@pytest.mark.parametrize("name", ["gemlite", "conch", "humming"])
def test_an_absent_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        kernel_peers.PEERS[name](random_weight(16, 128))


@pytest.mark.parametrize(
    ("name", "bits", "what"),
    [
        ("gemlite", 3, "2, 4 or 8"),
        ("conch", 3, "2, 4 or 8"),
        ("tinygemm", 8, "4 bits"),
        ("marlin", 2, "4 or 8"),
    ],
)
def test_what_a_peer_does_not_take_is_said(name: str, bits: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        kernel_peers.PEERS[name](random_weight(16, 128, bits=bits))
