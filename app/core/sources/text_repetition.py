"""Notes on text that says little for its length: the API looks at characters, the engine at token ids."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

LOOKED_AT = 2**16  # characters or tokens, from the start
RUNS = {"characters": 64, "tokens": 16}  # how many in a row are compared: about as much text
MOST_REPEATED = 0.5  # English has 0.01, code up to 0.4, one page again and again 0.98
MOST_SHARED = 0.1  # the two halves of WikiText-2 share 0.0003, two folders of one program 0.003


def text_notes(calibration: Sequence[Hashable], evaluation: Sequence[Hashable], unit: str) -> Iterator[str]:
    """Notes on a text that repeats itself, and on evaluation text that is calibrated on.

    `unit` is a key of RUNS. An empty text is not looked at.
    """
    seen = {
        name: runs(text, unit) for name, text in (("calibration", calibration), ("evaluation", evaluation))
    }
    for name, compared in seen.items():
        repeated = 1 - len(set(compared)) / max(1, len(compared))
        if compared and repeated >= MOST_REPEATED:
            yield (
                f"the {name} text repeats itself: {repeated:.0%} of its runs of {RUNS[unit]} {unit} stand in "
                "it before, so it says less than its length; give text that differs"
            )
    calibrated = set(seen["calibration"])
    shared = sum(run in calibrated for run in seen["evaluation"]) / max(1, len(seen["evaluation"]))
    if shared >= MOST_SHARED:
        yield (
            f"the recipes are calibrated on evaluation text: {shared:.0%} of its runs of {RUNS[unit]} {unit} "
            "stand in the calibration text, too, so its figures are better than those of new text would be; "
            "give other text for one of them"
        )


def runs(text: Sequence[Hashable], unit: str) -> list[Hashable]:
    """What stands in a row, from every character or token on."""
    looked_at = text[:LOOKED_AT] if isinstance(text, str) else tuple(text[:LOOKED_AT])
    return [looked_at[at : at + RUNS[unit]] for at in range(len(looked_at) - RUNS[unit] + 1)]
