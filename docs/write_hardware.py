"""Writes the tables of docs/guides/hardware.md from what recommendations and notes rest on.

`python -m docs.write_hardware`; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.planning.server_kernels import SERVERS, Use, best_use, kernels, row_of
from app.core.planning.serving_devices import DEVICES, GB, TERA, ServingDevice
from app.core.planning.serving_speed import BATCHES, ESTIMATED, PUBLISHED, speed_of
from app.core.records.device_names import DeviceName

PAGE = Path(__file__).parent / "guides" / "hardware.md"
BEGIN, END = "<!-- from the tables of the planner -->", "<!-- end of the tables -->"
# Bits per weight of a wide linear in groups of 128, scales and zero points included.
GRIDS: tuple[tuple[SchemeName, int, float], ...] = (
    ("fp8", 8, 8.0), ("fp8-block", 8, 8.0), ("fp8-static", 8, 8.0), ("w8a8", 8, 8.0), ("w8a8-static", 8, 8.0),
    ("wna16", 8, 8.19), ("wna16", 4, 4.16), ("wna16", 3, 3.15), ("wna16", 2, 2.15), ("w4a8", 4, 4.13),
    ("nvfp4", 4, 4.5), ("nvfp4a16", 4, 4.5), ("mxfp4", 4, 4.25), ("mxfp4a16", 4, 4.25),
)  # fmt: skip
MARKS: dict[Use, str] = {
    "numbers": "numbers", "weights": "weights", "emulated": "emulated", "none": "no", "not read": "?",
}  # fmt: skip


def scheme_of(name: SchemeName, bits: int) -> Scheme:
    kind = SCHEMES[name]
    return Scheme(bits=bits, group_size=kind.group_size or 128, symmetric=bool(kind.symmetric), name=name)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*lines: str) -> str:
    return "\n".join((lines[0], row(*["---"] * (lines[0].count("|") - 1)), *lines[1:]))


def device_table() -> str:
    lines = [row("name", "device", "memory", "bandwidth", "16 bits", "int8", "FP8", "FP4")]
    for name, device in DEVICES.items():
        memory = "" if device.memory is None else f"{device.memory // GB} GB"
        bandwidth = "" if device.bandwidth is None else f"{device.bandwidth / GB:.0f} GB/s"
        rates = [device.rates.get(numbers) for numbers in ("16 bits", "int8", "fp8", "fp4")]
        title = device.title + (f" ({device.capability:.1f})" if device.capability else "")
        lines.append(
            row(
                f"`{name}`", title, memory, bandwidth, *[f"{rate / TERA:g}" if rate else "" for rate in rates]
            )
        )
    return table(*lines)


def columns() -> dict[str, ServingDevice]:
    """One of the devices with the same kernels, by the names of all of them."""
    alike: dict[tuple[object, ...], list[DeviceName]] = {}
    for name, device in DEVICES.items():
        outcome = tuple(kernels(scheme_of(grid, bits), device) for grid, bits, _ in GRIDS)
        alike.setdefault(outcome, []).append(name)
    return {", ".join(names): DEVICES[names[0]] for names in alike.values()}


def kernel_table() -> str:
    lines = [row("scheme", *columns())]
    for name, bits, _ in GRIDS:
        scheme = scheme_of(name, bits)
        cells = []
        for device in columns().values():
            marks = [MARKS[kernel.use] for kernel in kernels(scheme, device)]
            cells.append(marks[0] if len(set(marks)) == 1 else " / ".join(marks))
        lines.append(row(f"`{row_of(scheme)}`", *cells))
    return table(*lines)


def speed_table() -> str:
    devices = {name: device for name, device in DEVICES.items() if device.bandwidth is not None}
    lines = [row("scheme", *devices)]
    for name, bits, bits_per_weight in GRIDS:
        scheme = scheme_of(name, bits)
        cells = [speed_cell(scheme, bits_per_weight, device) for device in devices.values()]
        if not name.endswith("-static"):  # as without it
            lines.append(row(f"`{row_of(scheme)}`", *cells))
    return table(*lines)


def speed_cell(scheme: Scheme, bits_per_weight: float, device: ServingDevice) -> str:
    use, cells = best_use(scheme, device), []
    for count in BATCHES:
        speed = speed_of(scheme, bits_per_weight, use, device, count)
        if speed is None:
            return ""
        text = speed.ratio_text.replace("at most ", "≤ ").replace(" to ", "–")
        cells.append(text if speed.basis == ESTIMATED else f"**{text}**")
    return " · ".join(cells)


def sources() -> Iterator[str]:
    yield from dict.fromkeys(
        f"- `{'`, `'.join(one.rows)}` at {one.capability:.1f}: {one.source}" for one in PUBLISHED
    )


def tables() -> str:
    first, second = SERVERS
    parts = (
        "### Devices\n\n" + device_table(),
        f"### Who multiplies what\n\n{first} / {second}, one word where both do the same:\n\n"
        + kernel_table(),
        "### How fast beside 16 bits\n\n"
        f"At {', '.join(map(str, BATCHES[:-1]))} and {BATCHES[-1]} sequences at a time; **bold** is "
        "published, the rest is estimated from bytes and rates and not measured:\n\n" + speed_table(),
        "Published:\n\n" + "\n".join(sources()),
    )
    return "\n\n".join(parts)


def page() -> str:
    """The page with its tables made anew."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
