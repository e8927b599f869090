"""The look that all figures share: sizes of print, colours by kind of row, legends, heat maps."""

import functools

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

# Okabe-Ito colours of the kinds of rows, told apart without red-green vision.
COLOURS = {"routed": "#0072B2", "static": "#D55E00", "mean": "#E69F00", "shuffled": "#009E73",
           "random": "#999999", "stochastic": "#CC79A7", "dense": "#000000", "base": "#666666",
           "oracle": "#009E73"}


SINGLE, DOUBLE = 3.3, 6.9         # inches: one column of a printed page, and both
LOOK = {"figure.constrained_layout.use": True, "figure.dpi": 110, "savefig.dpi": 220,
        "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
        "axes.titlesize": 8.5, "figure.titlesize": 9.5, "legend.frameon": False,
        "legend.handlelength": 1.6, "legend.columnspacing": 1.2, "lines.linewidth": 1.3,
        "axes.formatter.useoffset": False, "hatch.linewidth": 0.5}


def drawn(function):
    """Decorates a function that makes a figure: the look of all, whatever the caller's is.

    The font is matplotlib's own, so that a figure is the same on every machine. The settings stay,
    since some (the type of fonts in a PDF) are read when the figure is saved.
    """
    @functools.wraps(function)
    def styled(*arguments, **options):
        matplotlib.rcdefaults()
        sns.set_theme(context="paper", style="ticks", palette="colorblind", font="DejaVu Sans",
                      font_scale=0.85, rc=LOOK)
        return function(*arguments, **options)
    return styled


def legend(picture, axes=None, columns: int = 0, place: str = "lower center", **options):
    """One legend outside of all axes, where it covers no data; a label that recurs stands once.

    Args:
        axes: those whose labels it shows; by default all of the figure.
        columns: labels in a row; 0: four, or two in a figure of a single column.
        place: of 'upper', 'center', 'lower' with 'left', 'center', 'right', as matplotlib's.
    """
    handles = {}
    for part in picture.axes if axes is None else axes:
        for handle, label in zip(*part.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    columns = columns or (4 if picture.get_figwidth() > 5 else 2)
    return picture.legend(handles.values(), handles.keys(), loc=f"outside {place}", ncol=columns,
                          **options)


def intervals(axes, places, table: pd.DataFrame, middle: str, low: str = "low",
              high: str = "high", *, factor: float = 1, **options) -> None:
    """Points with their intervals, from three columns of a table, multiplied by `factor`."""
    spread = [factor * (table[middle] - table[low]).clip(lower=0),
              factor * (table[high] - table[middle]).clip(lower=0)]
    look = {"fmt": "o", "capsize": 3, "color": COLOURS["routed"]} | options
    axes.errorbar(places, factor * table[middle], yerr=spread, **look)


def unit_names(count: int, always_keep: int, units_per_layer: int = 1) -> list[str]:
    """What `count` units' gates decide on: layer numbers, and the part where layers have two."""
    parts = ("",) if units_per_layer == 1 else (" attention", " MLP")
    return [f"{always_keep + unit // units_per_layer}{parts[unit % units_per_layer]}"
            for unit in range(count)]


def heat(rates: dict[str, list[float]], first: dict, always_keep: int, label: str, title: str):
    """Rates between 0 and 1 as coloured cells: a row a variant, a column a routable unit.

    Args:
        first: a results row, which says on what layers and parts of layers the units are.
        always_keep: the layer of the first unit, where the row does not say it.
    """
    table = pd.DataFrame(rates.values(), index=list(rates))
    table.columns = unit_names(table.shape[1], int(first.get("always_keep", always_keep)),
                               1 + (first.get("unit") == "sublayer"))
    picture, axes = plt.subplots(figsize=(DOUBLE, 0.2 * len(table) + 1.1))
    few = table.shape[1] <= 16                # more numbers would run into one another
    sns.heatmap(table, vmin=0, vmax=1, cmap="cividis", ax=axes, annot=few, fmt=".2f",
                annot_kws={"size": 6.5}, cbar_kws={"label": label}, xticklabels=True)
    turned = any(" " in name for name in table.columns)
    axes.tick_params(axis="x", rotation=90 * turned)
    axes.tick_params(axis="y", rotation=0)
    axes.set(xlabel="layer", ylabel="", title=title)
    return picture
