"""The look that all figures share: colours by kind of row, intervals, layer numbers, heat maps."""

import functools

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

# Okabe-Ito colours of the kinds of rows, told apart without red-green vision.
COLOURS = {"routed": "#0072B2", "static": "#D55E00", "mean": "#E69F00", "shuffled": "#009E73",
           "random": "#999999", "stochastic": "#CC79A7", "dense": "#000000", "base": "#666666",
           "oracle": "#009E73"}


def drawn(function):
    """Decorates a function that makes a figure: the shared look before, a tight layout after."""
    @functools.wraps(function)
    def styled(*arguments, **options):
        sns.set_theme(context="paper", style="ticks", font_scale=1.1)
        matplotlib.rcParams |= {"figure.dpi": 110, "savefig.dpi": 200, "axes.spines.top": False,
                                "axes.spines.right": False, "pdf.fonttype": 42}
        picture = function(*arguments, **options)
        if picture is not None:
            picture.tight_layout()
        return picture
    return styled


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
    picture, axes = plt.subplots(figsize=(0.45 * table.shape[1] + 2.5, 0.36 * len(table) + 1.3))
    sns.heatmap(table, vmin=0, vmax=1, cmap="cividis", ax=axes, annot=True, fmt=".2f",
                annot_kws={"size": 6}, cbar_kws={"label": label}, xticklabels=True)
    axes.set(xlabel="layer", ylabel="", title=title)
    return picture
