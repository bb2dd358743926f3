"""What the schemes of a job mean on the device that the model will be served on, said before the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.core.formats.file_format import Scheme
from app.core.planning.server_kernels import (
    USE_TEXT,
    ServerKernel,
    Use,
    best_use,
    kernels,
    rounds_inputs,
    row_of,
)
from app.core.planning.serving_devices import DEVICES, ServingDevice
from app.core.planning.serving_speed import BATCHES, Speed, speed_of
from app.core.records.device_names import DeviceName
from app.core.records.specs import Frozen


class Advice(Frozen):
    """One scheme on one device."""

    scheme: str
    use: Use  # the best that any server does with it
    kernels: tuple[ServerKernel, ...]
    speeds: tuple[Speed, ...]  # at 1, 16 and 64 sequences, as far as anything can be said

    @property
    def text(self) -> str:
        """In words."""
        servers = ", ".join(f"{one.server} {USE_TEXT[one.use]}" for one in self.kernels)
        return f"{self.scheme}: {servers}; {speeds_text(self.speeds, self.use)}"


def advice(scheme: Scheme, bits_per_weight: float, device: ServingDevice) -> Advice:
    """Of a scheme whose weights take so many bits, scales included."""
    use = best_use(scheme, device)
    speeds = [speed_of(scheme, bits_per_weight, use, device, sequences) for sequences in BATCHES]
    return Advice(
        scheme=row_of(scheme),
        use=use,
        kernels=kernels(scheme, device),
        speeds=tuple(one for one in speeds if one is not None),
    )


def speeds_text(speeds: Sequence[Speed], use: Use) -> str:
    """How fast beside 16 bits, with what the figures rest on."""
    if not speeds:
        emulated = use in ("none", "emulated")
        return "no faster than 16 bits" if emulated else "how fast it is there nobody has published"
    by_basis: dict[str, list[Speed]] = {}
    for speed in speeds:
        by_basis.setdefault(speed.basis, []).append(speed)
    groups = [
        f"{', '.join(f'{one.ratio_text} at {one.sequences}' for one in group)} ({basis})"
        for basis, group in by_basis.items()
    ]
    return f"times as fast as 16 bits by sequences at a time: {'; '.join(groups)}"


def serving_notes(
    name: DeviceName | None, schemes: Sequence[Scheme], bits_per_weight: float
) -> Iterator[str]:
    """A note on each of a recipe's schemes for the device that a job names; none without one."""
    if name is None:
        return
    device = DEVICES[name]
    for scheme in schemes:
        # Of several schemes the scales of each are not told apart.
        own = advice(scheme, bits_per_weight if len(schemes) == 1 else scheme.bits, device)
        yield f"served on {name}, {own.text}"
        if rounds_inputs(scheme, own.use) and scheme.kind.inputs is None:
            yield f"served on {name}, vLLM rounds the inputs of {own.scheme} too, though its files don't ask"
