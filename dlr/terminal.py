"""The token strip in a terminal: the same ramp in ANSI colours, the same numbers.

Control characters of the text are shown as signs, so that no text can move the cursor or change the terminal.
"""

import os
import sys

from dlr.palette import ink, ramp
from dlr.record import Record
from dlr.tokens import shown, spans
from dlr.views import Cost, Look, bounds, depths, grid, level, number, said_execution

_SMALL = str.maketrans("0123456789.", "₀₁₂₃₄₅₆₇₈₉.")
RESET = "\x1b[0m"


def wants_colour(stream=None) -> bool:
    """Whether `stream` is a terminal and NO_COLOR is not set (https://no-color.org)."""
    stream = stream or sys.stdout
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and not os.environ.get("NO_COLOR"))


def _paint(text: str, colour: str, on: bool) -> str:
    if not on:
        return text
    back, front = ([int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in (colour, ink(colour)))
    return f"\x1b[48;2;{';'.join(map(str, back))}m\x1b[38;2;{';'.join(map(str, front))}m{text}{RESET}"


def strip(record: Record, look: Look = Look(), colour: bool = True) -> str:
    """The text with each token's depth behind it, shaded where `colour` is on."""
    low, high = bounds(record, look)
    colours, out = ramp(), []
    for token, depth, raw in zip(shown(record), depths(record, look).tolist(), record.tokens):
        text = f"{token.text}{f'{depth:g}'.translate(_SMALL)}"
        out.append(_paint(text, colours[level(depth, low, high)], colour) + ("\n" if "\n" in raw else ""))
    return "".join(out)


def profile(record: Record, look: Look = Look()) -> str:
    """One line a layer: the share of tokens that ran it, as a bar."""
    rates = grid(record).mean(0).tolist()
    always = record.meta["always_keep"], record.meta["layers"] - record.meta["keep_last"]
    return "\n".join(f"  layer {i:>3}  {'█' * round(30 * rates[i]):<30} {100 * rates[i]:5.1f} %"
                     + ("" if always[0] <= i < always[1] else "  always kept") for i in look.layers(record))


def cost_line(record: Record, cost: Cost | None = None) -> str:
    """The numbers of the view's tiles, in one or two lines."""
    parts = [f"skipped {100 * record.skip_ratio:.1f} %",
             f"{float(record.active_layers.mean()):.2f} of {record.meta['layers']} layers a token",
             f"perplexity {number(record.perplexity(), 2, '–')} routed, {number(record.perplexity('dense'), 2, '–')} dense"]
    if cost is not None:
        parts.insert(2, f"FLOPs {cost.flops_routed / cost.flops_dense:.3f} × dense")
        if cost.ms_dense is not None:
            parts.append(f"{cost.ms_routed:.0f} ms routed, {cost.ms_dense:.0f} ms dense ({said_execution(cost.execution)})")
    return " · ".join(parts)


def view(record: Record, cost: Cost | None = None, look: Look = Look(), colour: bool = True) -> str:
    """Cost line, strip and layer profile."""
    low, high = bounds(record, look)
    steps = [low + i for i in range(int(high - low) + 1)]
    legend = " ".join(_paint(f" {s:g} ", ramp()[level(s, low, high)], colour) for s in steps)
    layers = look.layers(record)
    return (f"{cost_line(record, cost)}\n\n{strip(record, look, colour)}\n\n"
            f"layers run (of {spans(list(layers))}): {legend}\n\n{profile(record, look)}")
