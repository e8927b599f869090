"""The explorer's view as a figure: the text over its layers, for papers and for pages without HTML."""

import warnings

import matplotlib.pyplot as plt
from matplotlib.collections import PolyCollection

from dlr.palette import ink, ramp
from dlr.record import Record
from dlr.tokens import shown, width
from dlr.views import Look, bounds, depths, grid, level, lines_of, number, said_plan

KEPT, SKIPPED = "#aeb7c0", "#edf0f3"
INCH_A_COLUMN, INCH_A_ROW = 0.077, 0.075


def _cells(axes, left: float, size: float, top: float, shares: list[float], always: list[bool], colour: str) -> None:
    boxes, colours = [], []
    for row, share in enumerate(shares):
        y = top + row
        parts = [(1.0, SKIPPED)] * (share < 1) + [(share, KEPT if always[row] else colour)] * (share > 0)
        for part, shade in parts:                            # half a cell for half a layer
            bottom = y + 0.88 * part
            boxes.append([(left, y), (left + size, y), (left + size, bottom), (left, bottom)])
            colours.append(shade)
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none"))


def token_map(record: Record, look: Look = Look(), columns: int = 96):
    """Tokens x layers under the text, wrapped; depth below each token, share of tokens a layer at the right."""
    layers, tokens, meta = look.layers(record), shown(record), record.meta
    table = grid(record)[:, layers.start:layers.stop]
    low, high = bounds(record, look)
    colours, found = ramp(), depths(record, look).tolist()
    always = [i < meta["always_keep"] or i >= meta["layers"] - meta["keep_last"] for i in layers]
    lines = lines_of(tokens, columns)
    block = len(layers) + 6.2
    figure, axes = plt.subplots(figsize=(INCH_A_COLUMN * (columns + 18), INCH_A_ROW * block * len(lines) + 0.55))
    axes.set(xlim=(-5, columns + 13), ylim=(block * len(lines) + 1.5, -5.2))
    axes.axis("off")
    fixed = {"family": ["DejaVu Sans Mono"], "fontsize": 7, "ha": "center", "parse_math": False, "clip_on": True}
    for place, line in enumerate(lines):
        top, left = place * block + 2.2, 0.0
        for i in line:
            size = max(3, width(tokens[i].marked))
            colour = colours[level(found[i], low, high)]
            _cells(axes, left, size - 0.15, top, table[i].tolist(), always, colour)
            axes.text(left + size / 2, top - 0.5, tokens[i].marked or "∅", va="bottom", **fixed)
            axes.add_patch(plt.Rectangle((left, top + len(layers)), size - 0.15, 1.9, color=colour, lw=0))
            axes.text(left + size / 2, top + len(layers) + 1.05, f"{found[i]:g}", va="center", color=ink(colour),
                      **{**fixed, "fontsize": 5.5})
            left += size
        step = 1 if len(layers) <= 6 else 4 if len(layers) <= 40 else 8
        for row, layer in enumerate(layers):
            if layer % step == 0 or layer == layers[-1]:
                axes.text(-0.7, top + row + 0.5, str(layer), ha="right", va="center", fontsize=5.5, color="#59636e")
            rate = float(table[:, row].mean())
            axes.add_patch(plt.Rectangle((left + 0.8, top + row), 6 * rate, 0.88, color="#59636e", lw=0))
    axes.text(-4.6, -3.4, f"{100 * record.skip_ratio:.1f} % skipped · {float(record.active_layers.mean()):.2f} of "
              f"{meta['layers']} layers a token · perplexity {number(record.perplexity(), 2, '–')} routed, "
              f"{number(record.perplexity('dense'), 2, '–')} dense · {said_plan(record)}", fontsize=7, va="center",
              parse_math=False)
    axes.text(-4.6, block * len(lines) + 0.8, "grey: always kept · shade and number: layers the token ran · pale: skipped · "
              "bars: share of all tokens that ran the layer", fontsize=6, color="#59636e", va="center")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.canvas.draw()
    return figure
