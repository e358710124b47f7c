"""Charts of an evaluation as inline SVG, coloured by the page's style."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jinja2 import Environment

from llama_lora.eval.bootstrap import Estimate
from llama_lora.eval.held_out_loss import Conversation
from llama_lora.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

MOST_TICKS = 5
MOST_BARS = 150  # with more conversations, a bar is the mean of several neighbours
ROW = 70  # pixels for a side in the chart of the intervals

environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

INTERVALS = environment.from_string(
    """<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for x, label in ticks %}
<line class="grid" x1="{{ x }}" x2="{{ x }}" y1="{{ top }}" y2="{{ floor }}"/>
<text class="tick" x="{{ x }}" y="{{ floor + 16 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for row in rows %}
<g class="{{ row.side }}"><title>{{ row.title }}</title>
<text class="name" x="{{ left }}" y="{{ row.y - 12 }}">{{ row.name }}</text>
<line class="reach" x1="{{ row.low }}" x2="{{ row.high }}" y1="{{ row.y }}" y2="{{ row.y }}"/>
<circle cx="{{ row.x }}" cy="{{ row.y }}" r="5"/></g>
{% endfor %}
<line class="axis" x1="{{ left }}" x2="{{ right }}" y1="{{ floor }}" y2="{{ floor }}"/>
<text class="unit" x="{{ (left + right) / 2 }}" y="{{ height - 4 }}" \
text-anchor="middle">{{ unit }}</text>
</svg>"""
)

CHANGES = environment.from_string(
    """<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for y, label in ticks %}
<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" y2="{{ y }}"/>
<text class="tick" x="{{ left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for bar in bars %}
<g class="{{ bar.kind }}"><title>{{ bar.title }}</title>\
<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}"/></g>
{% endfor %}
<line class="axis" x1="{{ left }}" x2="{{ right }}" y1="{{ zero }}" y2="{{ zero }}"/>
<text class="unit" x="{{ (left + right) / 2 }}" y="{{ height - 4 }}" \
text-anchor="middle">{{ unit }}</text>
</svg>"""
)


@dataclass(frozen=True)
class Scale:
    """Maps `low` … `high` to the pixels `start` … `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """At most `MOST_TICKS` round values with their places."""
        step = round_step((self.high - self.low) / MOST_TICKS)
        digits = max(0, -math.floor(math.log10(step)))
        for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield self(number * step), f"{number * step:.{digits}f}".replace("-", "−")


def round_step(least: float) -> float:
    """The smallest of …, 0.1, 0.2, 0.5, 1, 2, 5, … that is at least `least`."""
    size = 10.0 ** math.floor(math.log10(least))
    return next(step * size for step in (1, 2, 5, 10) if step * size >= least * (1 - 1e-9))


def intervals(losses: dict[str, Estimate]) -> str:
    """The loss of each side with its interval."""
    ends = [value for loss in losses.values() for value in vars(loss).values() if value is not None]
    margin = (max(ends) - min(ends)) * 0.08 or 0.5
    right = WIDTH - RIGHT
    scale = Scale(min(ends) - margin, max(ends) + margin, RIGHT, right)
    rows = [
        {
            "side": side,
            "name": f"{side} {loss.value:.3f}",
            "title": f"{side}: {shown(loss)}",
            "y": TOP + ROW * (number + 1) - 26,
            "x": scale(loss.value),
            "low": scale(loss.value if loss.low is None else loss.low),
            "high": scale(loss.value if loss.high is None else loss.high),
        }
        for number, (side, loss) in enumerate(losses.items())
    ]
    floor = TOP + ROW * len(rows)
    return INTERVALS.render(
        title="loss per labelled token, with 95% intervals",
        unit="loss per labelled token",
        width=WIDTH,
        height=floor + BOTTOM,
        left=RIGHT,
        right=right,
        top=TOP,
        floor=floor,
        ticks=list(scale.ticks()),
        rows=rows,
    )


def changes(conversations: list[Conversation]) -> str:
    """What the adapter changed in each conversation, from the best to the worst."""
    ordered = sorted(conversations, key=lambda one: one.change)
    size = -(-len(ordered) // MOST_BARS)
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    values = [sum(one.change for one in group) / len(group) for group in groups]
    low, high = min(0, *values), max(0, *values)
    if low == high:
        low, high = -1.0, 1.0
    floor, right = HEIGHT - BOTTOM + 14, WIDTH - RIGHT
    scale = Scale(low, high, floor, TOP)
    step = (right - LEFT) / len(groups)
    gap = min(2, step / 8)
    return CHANGES.render(
        title="change of the loss in each conversation",
        unit="conversations, from best to worst",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=right,
        zero=scale(0),
        ticks=list(scale.ticks()),
        bars=[
            {
                "kind": "better" if value < 0 else "worse",
                "title": name_of(group, value),
                "x": round(LEFT + i * step + gap / 2, 1),
                "y": min(scale(0), scale(value)),
                "width": round(step - gap, 1),
                "height": round(abs(scale(value) - scale(0)), 1),
            }
            for i, (group, value) in enumerate(zip(groups, values, strict=True))
        ],
    )


def name_of(group: list[Conversation], value: float) -> str:
    """What a bar stands for."""
    first, rest = group[0], len(group) - 1
    return f"{first.id}{f' and {rest} others' if rest else ''}: {signed(value)}"


def signed(value: float) -> str:
    """A change of the loss, with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def shown(loss: Estimate, form: Callable[[float], str] = "{:.3f}".format) -> str:
    """A value with its interval."""
    limits = "" if loss.low is None else f" ({form(loss.low)} to {form(loss.high)})"
    return form(loss.value) + limits
