"""Histograms with axes as inline SVG, coloured by the page's style."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jinja2 import Template

MOST_BINS = 24
MOST_TICKS = 7
HEAVY_TAIL = 8  # times the median; if the largest value is beyond it, the scale is logarithmic
WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 38  # of the plot: room for the labels


@dataclass(frozen=True)
class Bin:
    """How many of the values are `low` … `high`, both included."""

    low: int
    high: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def histogram(values: Sequence[int]) -> list[Bin]:
    """Whole numbers in at most `MOST_BINS` bins of a round width.

    If a few of them are far larger than the rest, the bins are on a log scale.
    """
    numbers = np.asarray(values)
    least, most = int(numbers.min()), int(numbers.max())
    if most > MOST_BINS and most > HEAVY_TAIL * np.median(numbers):
        edges = log_edges(least, most)
    else:
        width = round_up((most - least + 1) / MOST_BINS)
        first = least // width * width
        edges = list(range(first, most + width + 1, width))
    counts, _ = np.histogram(numbers, edges)
    bins = [
        Bin(low, high - 1, int(n)) for (low, high), n in zip(pairwise(edges), counts, strict=True)
    ]
    while not bins[-1].count:
        bins.pop()
    return bins


def log_edges(least: int, most: int) -> list[int]:
    """Powers of two around `least` … `most`; 0 has its own bin.

    If `least` is 16 or more, also the powers of its root, which would be too fine below.
    """
    first = 2 * (max(least, 1).bit_length() - 1)
    step = 1 if least >= 16 else 2
    powers = [round(2 ** (half / 2)) for half in range(first, 2 * most.bit_length() + 1, step)]
    return powers if least else [0, *powers]


def round_up(number: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is at least `number`."""
    size = 1
    while True:
        for step in (1, 2, 5):
            if step * size >= number:
                return step * size
        size *= 10


SVG = Template(
    """<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for y, label in levels %}<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" \
y2="{{ y }}"/><text class="tick" x="{{ left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}\
</text>
{% endfor %}{% for bar in bars %}<g class="bar"><title>{{ bar.title }}</title>\
<rect class="reach" x="{{ bar.x }}" y="{{ top }}" width="{{ bar.width }}" height="{{ depth }}"/>\
<rect class="fill" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" \
height="{{ bar.height }}"/></g>
{% endfor %}<line class="axis" x1="{{ left }}" x2="{{ right }}" y1="{{ floor }}" y2="{{ floor }}"/>
{% for x, label in ticks %}<text class="tick" x="{{ x }}" y="{{ floor + 16 }}" \
text-anchor="middle">{{ label }}</text>
{% endfor %}{% if mark %}<line class="mark" x1="{{ mark }}" x2="{{ mark }}" y1="{{ top }}" \
y2="{{ floor }}"/><text class="tick" x="{{ mark - 5 }}" y="{{ top + 8 }}" text-anchor="end">\
window</text>{% endif %}<text class="unit" x="{{ (left + right) / 2 }}" y="{{ height - 4 }}" \
text-anchor="middle">{{ unit }}</text>
</svg>""",
    autoescape=True,
    keep_trailing_newline=False,
)


def svg(title: str, unit: str, bins: list[Bin], of: str, mark: int | None = None) -> str:
    """The histogram as an SVG element; `unit` names the values, `of` what is counted.

    There is a line at the value `mark`, if it is within the plot.
    """
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    step = (right - LEFT) / len(bins)
    level = round_up(max(one.count for one in bins) / 4)
    top_level = -(-max(one.count for one in bins) // level) * level
    scale = (floor - TOP) / top_level
    growing = len({one.high - one.low for one in bins}) > 1
    round_ones = [i for i, one in enumerate(bins) if not growing or one.low & (one.low - 1) == 0]
    every = -(-len(round_ones) // MOST_TICKS)
    # A bin of one value is labelled in its middle, a wider one where it begins.
    middle = step / 2 if all(one.low == one.high for one in bins) else 0
    gap = min(2, step / 8)
    return SVG.render(
        title=title,
        unit=unit + (", log scale" if growing else ""),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        floor=floor,
        depth=floor - TOP,
        levels=[
            (round(floor - n * scale, 1), short(n)) for n in range(level, top_level + 1, level)
        ],
        bars=[
            {
                "title": f"{one.name} {unit}: {one.count:,} {of}",
                "x": round(LEFT + i * step + gap / 2, 1),
                "y": round(floor - one.count * scale, 1),
                "width": round(step - gap, 1),
                "height": round(one.count * scale, 1),
            }
            for i, one in enumerate(bins)
        ],
        mark=mark and place(bins, mark, step),
        ticks=[
            (round(LEFT + i * step + middle, 1), short(bins[i].low)) for i in round_ones[::every]
        ],
    )


def place(bins: list[Bin], value: int, step: float) -> float | None:
    """Where along the axis `value` lies; None if no bin holds it."""
    for i, one in enumerate(bins):
        if one.low <= value <= one.high:
            return round(LEFT + step * (i + (value - one.low) / (one.high - one.low + 1)), 1)
    return None


def short(number: int) -> str:
    """A number for an axis: 900, 1.2k, 35k, 2M."""
    for size, sign in ((10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.{int(number < 10 * size)}f}".removesuffix(".0") + sign
    return str(number)
