"""Quantized models from headers alone: as plain ones, or refused with the reason and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import ModelRefused
from app.core.sources.model_headers import ModelHeaders
from app.core.sources.quantized_model import READERS, UNREAD, plain_headers
from app.core.sources.safetensors_header import TensorHeader

PROJ = "model.layers.0.mlp.up_proj"
Table = dict[str, tuple[str, tuple[int, ...]]]

CONFIG = {"model_type": "llama", "dtype": "bfloat16"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def compressed(*weights: dict[str, Any], targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    groups = {
        f"group_{number}": {"targets": [target], "weights": each}
        for number, (each, target) in enumerate(zip(weights, targets, strict=True))
    }
    return {"quant_method": "compressed-tensors", "config_groups": groups}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
# Each of a weight of 256 x 384, unless the name says otherwise.
FP8_TENSORS: Table = {f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.weight_scale_inv": ("F32", (2, 3))}
PACKED: Table = {
    f"{PROJ}.weight_packed": ("I32", (256, 48)), f"{PROJ}.weight_scale": ("BF16", (256, 3)),
    f"{PROJ}.weight_shape": ("I64", (2,)),
}  # fmt: skip
AWQ_TENSORS: Table = {
    f"{PROJ}.qweight": ("I32", (384, 32)), f"{PROJ}.qzeros": ("I32", (3, 32)),
    f"{PROJ}.scales": ("F16", (3, 256)),
}  # fmt: skip
GPTQ_TENSORS: Table = {
    f"{PROJ}.qweight": ("I32", (48, 256)), f"{PROJ}.qzeros": ("I32", (3, 32)),
    f"{PROJ}.scales": ("F16", (3, 256)), f"{PROJ}.g_idx": ("I32", (384,)),
}  # fmt: skip
NVFP4: Table = {
    f"{PROJ}.weight_packed": ("U8", (256, 192)), f"{PROJ}.weight_scale": ("F8_E4M3", (256, 24)),
    f"{PROJ}.weight_global_scale": ("F32", (1,)),
}  # fmt: skip
MXFP4_PACKED: Table = {f"{PROJ}.weight_packed": ("U8", (256, 192)), f"{PROJ}.weight_scale": ("U8", (256, 12))}
NAIVE: Table = {f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.weight_scale": ("BF16", (256, 1))}
BLOCKS: Table = {f"{PROJ}_blocks": ("U8", (4, 256, 12, 16)), f"{PROJ}_scales": ("U8", (4, 256, 12))}


def headers(entry: object, table: Table, **config: Any) -> ModelHeaders:
    table = {"model.norm.weight": ("BF16", (384,)), **table}
    tensors = {
        name: TensorHeader(dtype=dtype, shape=shape, file="model.safetensors", start=0, end=0)
        for name, (dtype, shape) in table.items()
    }
    body = {**CONFIG, "quantization_config": entry, **config}
    return ModelHeaders(config=body, tensors=tensors, files={}, side_files=(), code=(), notes=("before",))


def refusal(entry: object, table: Table, **config: Any) -> ModelRefused:
    with pytest.raises(ModelRefused) as refused:
        plain_headers(headers(entry, table, **config))
    return refused.value


ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
KINDS: dict[str, tuple[dict[str, Any], Table, str]] = {
    "fp8": (FP8, FP8_TENSORS, "FP8 in blocks of 128x128"),
    "fp8, one scale": (
        {"quant_method": "fp8"},
        {f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.weight_scale_inv": ("F32", ())},
        "FP8 with one scale",
    ),
    "fp8, exponents in groups": (
        {"quant_method": "fp8", "weight_block_size": [1, 32]},
        {f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.weight_scale_inv": ("U8", (256, 12))},
        "FP8 in groups of 32",
    ),
    "DeepSeek-V4's names": (
        FP8,
        {
            f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.scale": ("F8_E8M0", (2, 3)),
            "model.layers.0.q_norm.scale": ("BF16", (16,)),
        },
        "FP8 in blocks of 128x128",
    ),
    "DeepSeek-V4's experts": (
        FP8, {f"{PROJ}.weight": ("I8", (256, 192)), f"{PROJ}.scale": ("F8_E8M0", (256, 12))}, "MXFP4",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, NAIVE, "FP8 by row"),
    "mxfp4": ({"quant_method": "mxfp4"}, BLOCKS, "MXFP4"),
    "awq": (AWQ, AWQ_TENSORS, "AWQ, int4 in groups of 128"),
    "gptq": (GPTQ, GPTQ_TENSORS, "GPTQ, int4 in groups of 128"),
    "gptq without g_idx": (
        GPTQ, {name: tensor for name, tensor in GPTQ_TENSORS.items() if "g_idx" not in name},
        "GPTQ, int4 in groups of 128",
    ),
    "pack-quantized": (compressed(INT4), PACKED, "int4 in groups of 128"),
    "int-quantized": (
        compressed({"num_bits": 8, "type": "int", "strategy": "channel"}),
        {f"{PROJ}.weight": ("I8", (256, 384)), f"{PROJ}.weight_scale": ("BF16", (256, 1))}, "int8 by row",
    ),
    "float-quantized": (compressed(ROWS), NAIVE, "FP8 by row"),
    "float-quantized, one scale": (
        compressed(ROWS), {**NAIVE, f"{PROJ}.weight_scale": ("BF16", (1,))}, "FP8 with one scale",
    ),
    "float-quantized, blocks": (
        compressed({**ROWS, "strategy": "block", "block_structure": [128, 128]}),
        {**NAIVE, f"{PROJ}.weight_scale": ("BF16", (2, 3))}, "FP8 in blocks of 128x128",
    ),
    "nvfp4": (compressed({"num_bits": 4, "type": "float"}), NVFP4, "NVFP4"),
    "mxfp4 of compressed-tensors": (compressed({"num_bits": 4, "type": "float"}), MXFP4_PACKED, "MXFP4"),
    "modelopt": (
        MODELOPT,
        {
            f"{PROJ}.weight": ("U8", (256, 192)), f"{PROJ}.weight_scale": ("F8_E4M3", (256, 24)),
            f"{PROJ}.weight_scale_2": ("F32", ()), f"{PROJ}.input_scale": ("F32", ()),
        },
        "NVFP4",
    ),
    "modelopt, FP8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {f"{PROJ}.weight": ("F8_E4M3", (256, 384)), f"{PROJ}.weight_scale": ("F32", ())},
        "FP8 with one scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "table", "encoding"), KINDS.values(), ids=list(KINDS))
def test_each_kind_is_a_plain_model(entry: dict[str, Any], table: Table, encoding: str) -> None:
    plain = plain_headers(headers(entry, table))
    assert plain.config == CONFIG
    (name,) = (name for name in plain.tensors if name.startswith(PROJ))
    tensor = plain.tensors[name]
    assert (tensor.dtype, tensor.shape[-2:], tensor.encoding) == ("BF16", (256, 384), encoding)
    assert name == (PROJ if len(tensor.shape) == 3 else f"{PROJ}.weight")
    assert plain.tensors["model.norm.weight"].quantized is None
    note, before = plain.notes
    assert before == "before"
    assert f"({entry['quant_method']}; tensors: 1 in {encoding})" in note
    assert "read as bfloat16" in note
    assert "not measured here" in note
    assert ("may round the inputs" in note) == any("input_scale" in name for name in table)
    assert plain.source.types[encoding] == 1


def test_blocks_may_be_cut() -> None:
    cut: Table = {f"{PROJ}.weight": ("F8_E4M3", (300, 200)), f"{PROJ}.weight_scale_inv": ("BF16", (3, 2))}
    tensor = plain_headers(headers(FP8, cut)).tensors[f"{PROJ}.weight"]
    assert (tensor.shape, tensor.encoding) == ((300, 200), "FP8 in blocks of 128x128")


def test_every_reader_has_a_kind_here() -> None:
    named = {entry["quant_method"] for entry, _, _ in KINDS.values()}
    assert named | {"modelopt_fp4"} == set(READERS)


@pytest.mark.parametrize(("method", "reason"), UNREAD.items())
def test_kinds_that_are_not_read(method: str, reason: tuple[str, str]) -> None:
    error = refusal({"quant_method": method}, FP8_TENSORS)
    assert error.code == "already_quantized"
    assert repr(method) in error.message
    assert reason[0] in error.message
    assert error.remedy == reason[1]


def without(table: Table, *names: str) -> Table:
    return {name: tensor for name, tensor in table.items() if name.removeprefix(f"{PROJ}.") not in names}


def changed(table: Table, **tensors: tuple[str, tuple[int, ...]]) -> Table:
    return {**table, **{f"{PROJ}.{name}": tensor for name, tensor in tensors.items()}}


TWO = compressed(INT4, {**INT4, "num_bits": 8}, targets=("re:.*q_proj$", "re:.*k_proj$"))
INVALID: dict[str, tuple[object, Table, str]] = {
    "no scale": (FP8, without(FP8_TENSORS, "weight_scale_inv"), "weight_scale_inv is missing beside"),
    "a scale of another shape": (FP8, changed(FP8_TENSORS, weight_scale_inv=("F32", (2, 5))), "[2, 5]"),
    "a scale of another dtype": (FP8, changed(FP8_TENSORS, weight_scale_inv=("I32", (2, 3))), "is I32"),
    "blocks that are none": ({**FP8, "weight_block_size": [0, 128]}, FP8_TENSORS, "blocks of [0, 128]"),
    "nothing of the kind": (FP8, {f"{PROJ}.weight": ("BF16", (256, 384))}, "no tensor is stored so"),
    "two kinds": (FP8, {**FP8_TENSORS, "model.layers.1.qweight": ("I32", (4, 4))}, "several kinds"),
    "a weight twice": (AWQ, {**AWQ_TENSORS, f"{PROJ}.weight": ("BF16", (256, 384))}, "plain and quantized"),
    "awq without zeros": (AWQ, without(AWQ_TENSORS, "qzeros"), "qzeros is missing"),
    "awq, scales of another shape": (AWQ, changed(AWQ_TENSORS, scales=("F16", (4, 256))), "needs [3, 256]"),
    "awq, groups that are not whole": ({**AWQ, "group_size": 100}, AWQ_TENSORS, "does not divide"),
    "awq, no number": ({**AWQ, "group_size": "128"}, AWQ_TENSORS, "expected a positive integer or -1"),
    "gptq of 5 bits": (GPTQ, changed(GPTQ_TENSORS, qweight=("I32", (60, 256))), "5 bits"),
    "gptq, an empty weight": (GPTQ, changed(GPTQ_TENSORS, qweight=("I32", (0, 256))), "expected a matrix"),
    "gptq, zeros of another shape": (GPTQ, changed(GPTQ_TENSORS, qzeros=("I32", (3, 31))), "needs [3, 32]"),
    "no groups": ({"quant_method": "compressed-tensors"}, PACKED, "no config_groups"),
    "groups that are no groups": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {}, "targets": 4}, "b": 3}},
        PACKED, "no config_groups",
    ),
    "6 bits": (compressed({**INT4, "num_bits": 6}), PACKED, "num_bits"),
    "no group for a linear": (TWO, PACKED, f"names {PROJ}"),
    "a pattern without end": (
        compressed(INT4, INT4, targets=("re:(a+)+x", "Linear")), PACKED, "could take very long",
    ),
    "thousands of patterns": (
        compressed(*[INT4] * 300, targets=tuple(f"re:.*{number}$" for number in range(300))), PACKED,
        "more than 256 patterns",
    ),
    "words that do not fit": (compressed({**INT4, "group_size": 64}), PACKED, "weight_packed has the shape"),
    "no packed scale": (compressed(INT4), without(PACKED, "weight_scale"), "weight_scale is missing"),
    "nvfp4 without the whole's scale": (
        compressed(INT4), without(NVFP4, "weight_global_scale"), "weight_scale is F8_E4M3",
    ),
    "mxfp4 without scales": (
        {"quant_method": "mxfp4"}, without(BLOCKS, f"{PROJ}_scales"), "_scales is missing",
    ),
    "mxfp4 of other groups": (
        {"quant_method": "mxfp4"}, {**BLOCKS, f"{PROJ}_blocks": ("U8", (4, 256, 12, 8))}, "must be 16",
    ),
    "modelopt with scaled inputs": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        changed(NAIVE, weight_scale=("F32", ()), pre_quant_scale=("F32", (384,))), "pre_quant_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "table", "words"), INVALID.values(), ids=list(INVALID))
def test_files_that_contradict_themselves(entry: object, table: Table, words: str) -> None:
    error = refusal(entry, table)
    assert error.code == "quantized_source_invalid"
    assert words in error.message
    assert error.remedy


LAYOUTS: dict[str, tuple[object, Table, str]] = {
    "AWQ's other layouts": ({**AWQ, "version": "gemv"}, AWQ_TENSORS, "'gemv'; read is gemm"),
    "AWQ of other bits": ({**AWQ, "bits": 8}, AWQ_TENSORS, "'8'; read is 4"),
    "Marlin": ({**GPTQ, "checkpoint_format": "marlin"}, GPTQ_TENSORS, "read is gptq, gptq_v2"),
    "modelopt's others": ({**MODELOPT, "quant_algo": "W4A8_AWQ"}, NVFP4, "read is FP8, NVFP4"),
    "sparse weights": ({**compressed(INT4), "sparsity_config": {"format": "x"}}, PACKED, "sparsity_config"),
    "no method": ({}, FP8_TENSORS, "names no quant_method; read are fp8"),
    "a list": ({"quant_method": ["awq"]}, FP8_TENSORS, "nobody has said how"),
    "a text": ("awq", FP8_TENSORS, "is 'awq'"),
}


@pytest.mark.parametrize(("entry", "table", "words"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_layouts_that_are_not_read(entry: object, table: Table, words: str) -> None:
    error = refusal(entry, table)
    assert error.code == "already_quantized"
    assert words in error.message
    assert "submit the original model" in error.remedy


@pytest.mark.parametrize("table", [FP8_TENSORS, AWQ_TENSORS, PACKED, NAIVE, BLOCKS])
def test_quantized_tensors_without_an_entry_are_refused(table: Table) -> None:
    error = refusal(None, table)
    assert error.code == "quantized_source_invalid"
    assert "config.json has no quantization_config" in error.message


def test_an_entry_of_the_text_part_counts_and_goes() -> None:
    text = {"dtype": "float16", "quantization_config": FP8}
    plain = plain_headers(headers(None, FP8_TENSORS, text_config=text, dtype=None))
    assert plain.config["text_config"] == {"dtype": "float16"}
    assert "quantization_config" not in plain.config
    assert plain.tensors[f"{PROJ}.weight"].dtype == "F16"


def test_without_a_dtype_the_plain_matrices_have_it() -> None:
    table: Table = {**FP8_TENSORS, "model.embed_tokens.weight": ("F32", (10, 384))}
    plain = plain_headers(headers(FP8, table, dtype=None))
    assert plain.tensors[f"{PROJ}.weight"].dtype == "F32"


def test_one_of_several_groups_is_found_by_name() -> None:
    entry = compressed(INT4, {**INT4, "num_bits": 8, "group_size": 64}, targets=("re:.*up_proj$", "Linear"))
    down = "model.layers.0.mlp.down_proj"
    wide: Table = {f"{down}.weight_packed": ("I32", (64, 32)), f"{down}.weight_scale": ("BF16", (64, 2))}
    plain = plain_headers(headers(entry, {**PACKED, **wide}))
    assert plain.tensors[f"{PROJ}.weight"].encoding == "int4 in groups of 128"
    assert plain.tensors[f"{down}.weight"].encoding == "int8 in groups of 64"
    assert plain.tensors[f"{down}.weight"].shape == (64, 128)


def test_plain_models_stay_as_they_are() -> None:
    plain = headers(None, {f"{PROJ}.weight": ("BF16", (256, 384))})
    assert plain_headers(plain) == plain
