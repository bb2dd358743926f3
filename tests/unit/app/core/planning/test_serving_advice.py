"""What schemes mean on devices: kernels by the table, speeds by bytes and rates or as published, notes."""

from __future__ import annotations

from typing import get_args

import pytest

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.planning.server_kernels import TABLE, Use, best_use, kernels, row_of
from app.core.planning.serving_advice import advice
from app.core.planning.serving_devices import DEVICES, Platform, device_called
from app.core.planning.serving_speed import BATCHES, ESTIMATED, Speed, speed_of
from app.core.records.device_names import DeviceName
from tests.unit.app.core.planning.headers import asked, planned

W4 = Scheme(bits=4, group_size=128, symmetric=False)


def scheme(name: SchemeName, bits: int = 4) -> Scheme:
    kind = SCHEMES[name]
    return Scheme(
        bits=kind.bits or bits, group_size=kind.group_size or 128, symmetric=bool(kind.symmetric), name=name
    )


def speeds(one: Scheme, bits: float, device: DeviceName) -> list[Speed | None]:
    use = best_use(one, DEVICES[device])
    return [speed_of(one, bits, use, DEVICES[device], count) for count in BATCHES]


def test_every_device_that_can_be_named_is_described() -> None:
    assert set(DEVICES) == set(get_args(DeviceName))
    for name, device in DEVICES.items():
        assert (device.memory is None) == (name == "cpu")
        assert set(device.rates) <= {"16 bits", "int8", "fp8", "fp4"}
        rates = list(device.rates.values())
        assert rates[:2] == sorted(rates[:2])  # fewer bits are not slower


@pytest.mark.parametrize("platform", get_args(Platform))
def test_the_table_has_every_scheme_of_vllm(platform: Platform) -> None:
    rows = {row_of(scheme(name, bits)) for name in SCHEMES for bits in (2, 3, 4, 8)}
    assert set(TABLE["vLLM 0.33.0"][platform]) == rows


@pytest.mark.parametrize(
    ("one", "device", "vllm", "sglang"),
    [
        (W4, "h100", "weights", "weights"),
        (W4, "cpu", "weights", "not read"),
        (scheme("wna16", 3), "h100", "weights", "none"),
        (scheme("wna16", 8), "cpu", "none", "not read"),
        (scheme("fp8"), "a100", "weights", "weights"),
        (scheme("fp8"), "l4", "numbers", "numbers"),
        (scheme("fp8"), "mi300x", "numbers", "not read"),
        (scheme("fp8-block"), "l40s", "weights", "numbers"),
        (scheme("fp8-block"), "a10", "weights", "none"),
        (scheme("w8a8"), "a10", "numbers", "numbers"),
        (scheme("w8a8"), "b200", "none", "not read"),
        (scheme("w4a8"), "h200", "numbers", "none"),
        (scheme("w4a8"), "l40s", "none", "none"),
        (scheme("w4a8"), "rtx5090", "none", "none"),
        (scheme("nvfp4"), "h100", "weights", "weights"),
        (scheme("nvfp4"), "rtx5090", "numbers", "numbers"),
        (scheme("nvfp4"), "mi300x", "emulated", "not read"),
        (scheme("mxfp4"), "b200", "numbers", "none"),
    ],
)
def test_who_has_a_kernel(one: Scheme, device: DeviceName, vllm: Use, sglang: Use) -> None:
    assert [kernel.use for kernel in kernels(one, DEVICES[device])] == [vllm, sglang]


def test_an_estimate_is_of_bytes_and_rates() -> None:
    l40s = DEVICES["l40s"]
    (half,) = {speed.low for speed in speeds(scheme("fp8"), 8.0, "l40s") if speed}
    assert half == 2.0  # half the bytes, and twice the rate where that counts
    speed = speed_of(scheme("fp8"), 8.0, "numbers", l40s, 4096)
    assert speed is not None
    assert speed.low == pytest.approx(l40s.rates["fp8"] / l40s.rates["16 bits"], abs=0.01)
    assert speed.basis == ESTIMATED
    weights = speed_of(W4, 4.16, "weights", l40s, 4096)
    assert weights is not None
    assert (weights.low, weights.verdict) == (1.0, "depends on the kernel")  # products are of 16 bits


def test_weights_alone_are_no_promise_for_many_sequences() -> None:
    one, sixteen, many = speeds(W4, 4.16, "l40s")
    assert one is not None
    assert sixteen is not None
    assert many is not None
    assert (one.verdict, sixteen.verdict, many.verdict) == ("faster", "faster", "depends on the kernel")
    assert (many.at_most, many.ratio_text[:7]) == (True, "at most")


def test_published_figures_stand_in_place_of_estimates() -> None:
    """On Hopper no published W4A16 is faster than FP8 at 64, whatever bytes say."""
    fp8, w4 = speeds(scheme("fp8"), 8.0, "h100"), speeds(W4, 4.16, "h100")
    assert [each and each.verdict for each in fp8] == ["faster", "faster", "faster"]
    assert [each and each.verdict for each in w4] == [
        "faster", "depends on the kernel", "depends on the kernel",
    ]  # fmt: skip
    assert all(each and each.basis.startswith("published") for each in (*fp8, *w4))
    assert w4[2] is not None
    assert fp8[2] is not None
    assert (w4[2].low + w4[2].high) / 2 < fp8[2].low
    fp4 = speeds(scheme("nvfp4a16"), 4.5, "h100")[2]
    assert fp4 is not None
    assert fp4.basis == w4[2].basis  # weights alone of as many bits


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert advice(W4, 4.16, DEVICES["cpu"]).speeds == ()
    assert "nobody has published" in advice(W4, 4.16, DEVICES["cpu"]).text
    assert "no faster than 16 bits" in advice(scheme("nvfp4"), 4.5, DEVICES["mi300x"]).text


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 5090", "rtx5090"), ("Tesla T4", None),
        ("AMD Instinct MI300X", "mi300x"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("", None),
    ],
)  # fmt: skip
def test_devices_are_known_by_their_drivers_names(driver: str, name: DeviceName | None) -> None:
    assert device_called(driver) == name


def test_a_job_that_names_its_device_is_told_before_it_runs() -> None:
    plain = planned(asked(scheme="fp8", group_size=-1))
    assert not any("served on" in note for note in plain.notes)
    spec = asked(scheme="fp8", group_size=-1).model_copy(update={"serve_on": "h100"})
    (note,) = (note for note in planned(spec).notes if "served on" in note)
    assert note.startswith("recipe 0: served on h100, fp8: vLLM 0.33.0 multiplies its own numbers")
    assert "1.4 at 1, 1.3 at 16, 1.3 at 64 (published: TensorRT-LLM" in note


def test_a_scheme_without_a_kernel_is_told_of() -> None:
    spec = asked(scheme="mxfp4", group_size=32, method="rtn").model_copy(update={"serve_on": "cpu"})
    (note,) = (note for note in planned(spec).notes if "served on" in note)
    assert "vLLM 0.33.0 has no kernel" in note
    assert "no faster than 16 bits" in note


def test_inputs_that_a_server_rounds_unasked_are_told_of() -> None:
    def about(device: DeviceName) -> list[str]:
        spec = asked(scheme="mxfp4a16", group_size=32, method="rtn").model_copy(update={"serve_on": device})
        return [note for note in planned(spec).notes if "rounds the inputs" in note]

    assert len(about("b200")) == 1
    assert about("h100") == []
