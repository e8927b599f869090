"""The token strip in a terminal: the same ramp in ANSI colours, the same numbers.

Control characters of the text are shown as signs, so that no text can move the cursor or change the
terminal.
"""

import os
import sys

from dlr.explore.layout import (Cost, Layout, Look, said_depth, said_execution, said_perplexity,
                                steps)
from dlr.explore.style import ink, ramp
from dlr.explore.tokens import spans
from dlr.measure.record import Record

_SMALL = str.maketrans("0123456789.", "₀₁₂₃₄₅₆₇₈₉.")
RESET = "\x1b[0m"


def wants_colour(stream=None) -> bool:
    """Whether `stream` is a terminal and NO_COLOR is not set (https://no-color.org)."""
    stream = stream or sys.stdout
    forced, refused = (bool(os.environ.get(name)) for name in ("FORCE_COLOR", "NO_COLOR"))
    return forced or stream.isatty() and not refused


def _paint(text: str, colour: str, on: bool) -> str:
    if not on:
        return text
    back, front = (";".join(map(str, bytes.fromhex(c[1:]))) for c in (colour, ink(colour)))
    return f"\x1b[48;2;{back}m\x1b[38;2;{front}m{text}{RESET}"


def strip(layout: Layout, colour: bool = True) -> str:
    """The text with each token's depth behind it, shaded where `colour` is on."""
    colours, parts = ramp(), []
    for i, (token, depth) in enumerate(zip(layout.words.shown, layout.depths)):
        text = f"{token.text}{f'{depth:g}'.translate(_SMALL)}"
        newline = "\n" if "\n" in layout.record.tokens[i] else ""
        parts.append(_paint(text, colours[layout.level(i)], colour) + newline)
    return "".join(parts)


def profile(layout: Layout) -> str:
    """One line a layer: the share of tokens that ran it, as a bar."""
    return "\n".join(f"  layer {layer:>3}  {'█' * round(30 * rate):<30} {100 * rate:5.1f} %"
                     + ("  always kept" if always else "")
                     for layer, rate, always in zip(layout.layers, layout.rates, layout.always))


def cost_line(record: Record, cost: Cost | None = None) -> str:
    """The numbers of the view's tiles, in one or two lines."""
    parts = [f"skipped {100 * record.skip_ratio:.1f} %", said_depth(record),
             said_perplexity(record)]
    if cost is not None:
        parts.insert(2, f"FLOPs {cost.ratio:.3f} × dense")
        if cost.ms_dense is not None:
            parts.append(f"{cost.ms_routed:.0f} ms routed, {cost.ms_dense:.0f} ms dense "
                         f"({said_execution(cost.execution)})")
    return " · ".join(parts)


def view(record: Record, cost: Cost | None = None, look: Look = Look(), colour: bool = True) -> str:
    """Cost line, strip and layer profile."""
    layout, colours = Layout(record, look), ramp()
    legend = " ".join(_paint(f" {depth:g} ", colours[level], colour)
                      for depth, level in steps(layout.low, layout.high))
    return (f"{cost_line(record, cost)}\n\n{strip(layout, colour)}\n\n"
            f"layers run (of {spans(list(layout.layers))}): {legend}\n\n{profile(layout)}")
