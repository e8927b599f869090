"""A token's predicted harm curve and the price line, as the card of the explorer draws them.

A depth router's token takes the plan with the least harm + price * units run. Over the number of
units dropped that is where a line with the price as its slope, pushed up from below, first touches
the curve of its harms.
"""

import math
from typing import NamedTuple

from dlr.measure.record import Record

WIDTH, HEIGHT = 250, 84         # of the plot; its axes and margins are the template's
HEADROOM = 2.0                  # harms above so many times the price line's end are cut off


class Curve(NamedTuple):
    """One token's curve, in the plot's own units; y grows downwards.

    Attributes:
        curve, dots: SVG paths of the curve and of the book's plans on it.
        line: SVG path of the price line; '' where no price decides.
        chosen: (x, y) of the plan that the token runs.
        top, deepest: harm in nats and units dropped at the ends of the axes.
        words: the numbers as text; `said`: those of the plan that the token runs.
    """
    curve: str
    dots: str
    line: str
    chosen: tuple[float, float]
    top: float
    deepest: int
    words: str
    said: str


def harm_curve(record: Record, i: int) -> Curve | None:
    """The curve of token `i`; None where no depth router made its plan."""
    if record.harm is None or record.meta["policy"] != "RouterPolicy":
        return None
    depths, harm = record.meta["depths"], record.harm[i].tolist()
    dropped = int((~record.gates[i]).sum())
    chosen = max(plan for plan, depth in enumerate(depths) if depth <= dropped)
    price = record.meta["threshold"]
    forced = int(record.position[i]) < record.meta["keep_first_tokens"]
    priced = not forced and math.isfinite(price)
    ends = [harm[chosen] + price * (depth - depths[chosen]) for depth in (0, depths[-1])] \
        if priced else [0.0, max(harm)]
    top = min(max(harm), HEADROOM * max(harm[chosen], *ends)) or 1.0

    def place(depth: float, nats: float) -> tuple[float, float]:
        return round(WIDTH * depth / depths[-1], 1), round(HEIGHT * (1 - nats / top), 1)

    places = [place(depth, nats) for depth, nats in zip(depths, harm)]
    line = [place(0, ends[0]), place(depths[-1], ends[1])] if priced else []
    said = f"{harm[chosen]:.3g} nats predicted with {dropped} units dropped; " + (
        "it runs every layer at any price" if forced else
        f"price {price:.3g} nats a unit" if priced else "every gate is open")
    series = ", ".join(f"{depth}: {nats:.3g}" for depth, nats in zip(depths, harm))
    return Curve(path(places), "".join(f"M{x:g} {y:g}h0" for x, y in places), path(line),
                 places[chosen], top, depths[-1],
                 f"Predicted harm in nats by units dropped: {series}. {said}.", said)


def path(places: list[tuple[float, float]]) -> str:
    """An SVG path through `places`."""
    return "".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(places))
