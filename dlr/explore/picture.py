"""The explorer's view as a figure: the text over its layers, for papers and pages without HTML."""

import warnings

import matplotlib.pyplot as plt
from matplotlib.collections import PolyCollection

from dlr.explore.layout import Layout, Look, lines_of, said_depth, said_perplexity, said_plan
from dlr.explore.style import ink, ramp
from dlr.measure.record import Record

KEPT, SKIPPED, GREY = "#aeb7c0", "#edf0f3", "#59636e"
INCH_A_COLUMN, INCH_A_ROW = 0.077, 0.075
FONT = {"family": ["DejaVu Sans Mono"], "ha": "center", "parse_math": False, "clip_on": True}


def _bar(axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(plt.Rectangle((left, top), width, height, color=colour, lw=0))


def _column(axes, layout: Layout, i: int, left: float, top: float) -> None:
    """Token `i`: its text, its cells from `top` on, its depth below them."""
    token, colour = layout.words.shown[i], ramp()[layout.level(i)]
    size, middle, bottom = token.columns - 0.15, left + token.columns / 2, top + len(layout.layers)
    boxes, colours = [], []
    for row, (share, always) in enumerate(zip(layout.shares[i], layout.always)):
        parts = [(1.0, SKIPPED)] * (share < 1) + [(share, KEPT if always else colour)] * (share > 0)
        for part, shade in parts:                            # half a cell for half a layer
            y, end = top + row, top + row + 0.88 * part
            boxes.append([(left, y), (left + size, y), (left + size, end), (left, end)])
            colours.append(shade)
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none"))
    axes.text(middle, top - 0.5, token.marked or "∅", va="bottom", fontsize=7, **FONT)
    _bar(axes, left, bottom, size, 1.9, colour)
    axes.text(middle, bottom + 1.05, f"{layout.depths[i]:g}", va="center", color=ink(colour),
              fontsize=5.5, **FONT)


def _margins(axes, layout: Layout, right: float, top: float) -> None:
    """Layer numbers at the left, and at the right the share of all tokens that ran each."""
    layers = layout.layers
    step = 1 if len(layers) <= 6 else 4 if len(layers) <= 40 else 8
    for row, (layer, rate) in enumerate(zip(layers, layout.rates)):
        if layer % step == 0 or layer == layers[-1]:
            axes.text(-0.7, top + row + 0.5, str(layer), ha="right", va="center", fontsize=5.5,
                      color=GREY)
        _bar(axes, right + 0.8, top + row, 6 * rate, 0.88, GREY)


def token_map(record: Record, look: Look = Look(), columns: int = 96):
    """Tokens x layers under wrapped text; depths are below, each layer's share of tokens right."""
    layout = Layout(record, look)
    lines = lines_of(layout.words.shown, columns)
    block = len(layout.layers) + 6.2
    size = INCH_A_COLUMN * (columns + 18), INCH_A_ROW * block * len(lines) + 0.55
    figure, axes = plt.subplots(figsize=size)
    axes.set(xlim=(-5, columns + 13), ylim=(block * len(lines) + 1.5, -5.2))
    axes.axis("off")
    for place, line in enumerate(lines):
        top = place * block + 2.2
        left = 0.0
        for i in line:
            _column(axes, layout, i, left, top)
            left += layout.words.shown[i].columns
        _margins(axes, layout, left, top)
    axes.text(-4.6, -3.4, f"{100 * record.skip_ratio:.1f} % skipped · {said_depth(record)} · "
              f"{said_perplexity(record)} · {said_plan(record)}",
              fontsize=7, va="center", parse_math=False)
    axes.text(-4.6, block * len(lines) + 0.8,
              "grey: always kept · shade and number: layers the token ran · pale: skipped · "
              "bars: share of all tokens that ran the layer", fontsize=6, color=GREY, va="center")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.canvas.draw()
    return figure
