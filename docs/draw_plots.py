"""The recipe guide's plots and table, from the fidelity table of benchmarks.md: edit that, run this.

python -m docs.draw_plots        writes docs/images/plots/*.svg and the table of docs/guides/recipes.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
FIGURES = DOCS / "benchmarks.md"
GUIDE = DOCS / "guides" / "recipes.md"
PLOTS = DOCS / "images" / "plots"
MEASURED = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end of measured -->)", re.DOTALL)
ROW = re.compile(
    r"^\| W(?P<bits>\d) g(?P<group>\d+) \| (?P<method>[^|]+) \| (?P<ours>[\d.]+) \| (?P<peer>[\d.]+|-) \| "
    r"[\d.-]+ \| (?P<kl>[\d.]+) \|",
    re.MULTILINE,
)
ORIGINAL = re.compile(r"Original model: ([\d.]+\d)")
COLORS = {
    "rounding": "#5a5a6e", "AWQ": "#4338ca", "GPTQ": "#c2410c", "AWQ + GPTQ": "#0f766e",
    "OmniQuant": "#9d174d", "OmniQuant + GPTQ": "#0369a1",
}  # fmt: skip
SCALE_BITS = 16  # each group also keeps a scale and a zero point
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 56, 66


@dataclass(frozen=True)
class Measurement:
    """One row: a method at a width, and the peer's figure if it has the method."""

    bits: int
    group: int
    method: str
    perplexity: float
    peer: float | None
    kl: float

    @property
    def setting(self) -> str:
        return f"W{self.bits} g{self.group}"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (SCALE_BITS + self.bits) / self.group


def measured() -> tuple[float, list[Measurement]]:
    """The original's perplexity, and the rows of the table."""
    section = FIGURES.read_text("utf-8").partition("\n## Fidelity\n")[2].partition("\n## ")[0]
    original = ORIGINAL.search(section)
    rows = [
        Measurement(
            int(row["bits"]), int(row["group"]), row["method"].replace("*", "").strip(), float(row["ours"]),
            None if row["peer"] == "-" else float(row["peer"]), float(row["kl"]),
        )
        for row in ROW.finditer(section)
    ]  # fmt: skip
    if original is None or not rows:
        raise ValueError("benchmarks.md has no fidelity table of the form that this program reads")
    return float(original[1]), [row for row in rows if row.method in COLORS]


class Axes:
    """A rectangle with a linear or logarithmic scale on each side."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, log_x: bool = False, log_y: bool = False
    ) -> None:
        self.at_x = place(x, (LEFT, WIDTH - RIGHT), log=log_x)
        self.at_y = place(y, (HEIGHT - BOTTOM, TOP), log=log_y)

    def vertical(self, value: float, text: str, *, row: int = 0) -> str:
        """A line with its name below it, in one of two rows: neighbours don't meet."""
        at = self.at_x(value)
        return line(at, TOP, at, HEIGHT - BOTTOM) + label(at, HEIGHT - BOTTOM + 16 + 15 * row, text, "middle")

    def horizontal(self, value: float, text: str) -> str:
        at = self.at_y(value)
        return line(LEFT, at, WIDTH - RIGHT, at) + label(LEFT - 8, at + 4, text, "end")


def place(values: tuple[float, float], pixels: tuple[float, float], *, log: bool) -> Callable[[float], float]:
    scale = math.log10 if log else float
    low, high = scale(values[0]), scale(values[1])

    def at(value: float) -> float:
        return round(pixels[0] + (scale(value) - low) / (high - low) * (pixels[1] - pixels[0]), 1)

    return at


def line(x1: float, y1: float, x2: float, y2: float, stroke: tuple[str, int] = ("#e4e4ee", 1)) -> str:
    color, width = stroke
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="{width}"/>\n'


def label(x: float, y: float, text: str, anchor: str = "start", more: str = 'fill="#5a5a6e"') -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{text}</text>\n'


def dot(x: float, y: float, color: str, *, hollow: bool = False) -> str:
    fill = "#ffffff" if hollow else color
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>\n'


def picture(title: str, body: str, *, description: str) -> str:
    """A picture on a white card: it is legible on light and dark pages."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">\n'
        f"<title>{title}</title>\n<desc>{description}</desc>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>\n'
        + label(20, 28, title, more='font-weight="600" font-size="15" fill="#1b1b27"')
        + f"{body}</svg>\n"
    )


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    parts, x = [], LEFT
    for text, color, hollow in entries:
        parts.append(dot(x, 44, color, hollow=hollow) + label(x + 10, 48, text))
        x += 34 + 8 * len(text)
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = (step * 10.0**power for power in powers for step in (1, 2, 5))
    return [value for value in every if low <= value <= high]


def against_bits(
    rows: Sequence[Measurement], worth: Callable[[Measurement], float], names: tuple[str, str]
) -> str:
    """Lines of `worth` over bits per weight, one for each method; names: title, vertical axis."""
    values = [worth(row) for row in rows]
    low, high = min(values) / 1.4, max(values) * 1.4
    axes = Axes((2, 4.4), (low, high), log_y=True)
    body = "".join(axes.horizontal(tick, f"{tick:g}") for tick in ticks(low, high))
    settings = sorted((row.bits_per_weight, row.setting) for row in rows if row.method == "rounding")
    body += "".join(axes.vertical(bits, name, row=index % 2) for index, (bits, name) in enumerate(settings))
    for method in COLORS:
        points = sorted(
            (axes.at_x(row.bits_per_weight), axes.at_y(worth(row))) for row in rows if row.method == method
        )
        path = " ".join(f"{x},{y}" for x, y in points)
        body += f'<polyline points="{path}" fill="none" stroke="{COLORS[method]}" stroke-width="2"/>\n'
        body += "".join(dot(x, y, COLORS[method]) for x, y in points)
    body += legend([(method, color, False) for method, color in COLORS.items()])
    body += label((LEFT + WIDTH) / 2, HEIGHT - 12, "bits per weight, with scales and zero points", "middle")
    return picture(names[0], body, description=f"{names[1]} of each method over bits per weight")


def loss(perplexity: float, original: float) -> float:
    """Percent above the original's."""
    return 100 * (perplexity / original - 1)


def beside_peer(original: float, rows: Sequence[Measurement]) -> str:
    """For each setting and method: our loss of perplexity, and the peer's."""
    pairs = [(row, loss(row.perplexity, original), loss(row.peer, original)) for row in rows if row.peer]
    shares = [share for _, *both in pairs for share in both]
    axes = Axes((min(shares) / 1.3, max(shares) * 1.3), (len(pairs) - 0.4, -0.6), log_x=True)
    body = "".join(axes.vertical(tick, f"{tick:g} %") for tick in ticks(min(shares) / 1.3, max(shares) * 1.3))
    methods = dict.fromkeys(row.method for row, *_ in pairs)
    for index, (row, *both) in enumerate(pairs):
        y = axes.at_y(index)
        ours, peer = map(axes.at_x, both)
        body += line(ours, y, peer, y, (COLORS[row.method], 2))
        body += dot(peer, y, COLORS[row.method], hollow=True) + dot(ours, y, COLORS[row.method])
        if index % len(methods) == 0:
            body += label(LEFT - 8, y + 18, row.setting, "end")
            body += line(LEFT, y - 10, WIDTH - RIGHT, y - 10) if index else ""
    peers = [("llm-compressor", "#1b1b27", True)]
    body += legend([*[(method, COLORS[method], False) for method in methods], *peers])
    body += label((LEFT + WIDTH) / 2, HEIGHT - 12, "perplexity above the original's", "middle")
    return picture(
        "What each method loses, and the peer's same method",
        body,
        description="filled: ours; hollow: the peer's",
    )


def table(original: float, rows: Sequence[Measurement]) -> str:
    lines = [
        "| setting | bits per weight | method | perplexity | above the original | KL per token |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        best = min((each for each in rows if each.setting == row.setting), key=lambda each: each.kl)
        name = f"**{row.method}**" if row is best else row.method
        figures = f"{row.perplexity:.3f} | {loss(row.perplexity, original):+.2f} % | {row.kl:.5f}"
        lines.append(f"| {row.setting} | {row.bits_per_weight:.2f} | {name} | {figures} |")
    return "\n".join(lines)


def drawings() -> dict[str, str]:
    """Each file under images/plots, and its text."""
    original, rows = measured()
    return {
        "perplexity.svg": against_bits(
            rows, lambda row: loss(row.perplexity, original),
            ("Perplexity above the original's, in percent", "perplexity above the original's"),
        ),
        "divergence.svg": against_bits(
            rows, lambda row: row.kl, ("KL divergence from the original per token, in nats", "KL divergence")
        ),
        "peer.svg": beside_peer(original, rows),
    }  # fmt: skip


def guide() -> str:
    """The recipe guide with the table of today's figures."""
    return MEASURED.sub(lambda _: table(*measured()) + "\n\n", GUIDE.read_text("utf-8"))


def main() -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    for name, text in drawings().items():
        (PLOTS / name).write_text(text, "utf-8")
    GUIDE.write_text(guide(), "utf-8")


if __name__ == "__main__":
    main()
