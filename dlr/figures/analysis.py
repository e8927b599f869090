"""Figures of the token analysis, from a run's saved record and metrics alone; no model runs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, SINGLE, drawn, intervals, legend, unit_names
from dlr.measure.analysis import same_word
from dlr.measure.record import Record
from dlr.runs import Run


def record_of(run: Run) -> Record:
    """The token record that an analysis has saved."""
    return Record.load(run.folder / "record")


def _layers(run: Run) -> tuple[int, int]:
    """Layers always kept, and units a layer."""
    meta = record_of(run).meta
    return meta["always_keep"], meta["units_per_layer"]


def shipped(name: str, reads):
    """Registers a figure of the shipped router's run; `reads` gives its arguments from the run."""
    return figure("token_analysis", run="nano", reads=("metrics.json", "record.*"), command=(
        "python -m dlr run token_analysis --params params/token_analysis/nano.yaml"),
        files=lambda runs: {f"token_analysis_{name}": reads(run) for run in runs.values()})


@shipped("category_depth", lambda run: (run.metrics["categories"], *_layers(run)))
@drawn
def category_depth(rows: list[dict], always_keep: int = 4, units_per_layer: int = 1):
    """Mean active layers a category with 95 % intervals, and its keep rates layer by layer."""
    table = pd.DataFrame(rows)
    table = table[table["tokens"] > 0].sort_values("active_layers").reset_index(drop=True)
    keep = table.filter(like="keep_")
    picture, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 0.2 * len(table) + 1),
                                          sharey=True, width_ratios=[2, 3])
    places = np.arange(len(table)) + 0.5
    spread = [table["active_layers"] - table["low"], table["high"] - table["active_layers"]]
    left.errorbar(table["active_layers"], places, xerr=spread, fmt="o", ms=4, capsize=2,
                  color=COLOURS["routed"])
    mean = float(table.loc[table["category"] == "all", "active_layers"].iloc[0])
    left.axvline(mean, color="black", lw=0.8, ls=":")
    left.set_xlabel("active layers (95 % interval)")
    sns.heatmap(keep.to_numpy(), ax=right, vmin=0, vmax=1, cmap="cividis",
                cbar_kws={"label": "keep rate"},
                xticklabels=unit_names(keep.shape[1], always_keep, units_per_layer))
    right.set_xlabel("layer")
    left.set_yticks(places, [f"{row.category} ({row.tokens:,})" for row in table.itertuples()])
    picture.suptitle("Depth by category of the token read")
    return picture


CONTENDERS = {"static": "best static plan", "routed": "router", "oracle": "per-token oracle"}


@shipped("headroom", lambda run: (run.rows,))
@drawn
def headroom(rows: list[dict]):
    """KL of static plan, router and oracle against skip, and the headroom the router captures."""
    table = pd.DataFrame(rows)
    picture, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 3))
    for weights, line, marker, fill in (("checkpoint", "-", "o", None), ("base", "--", "s", "w")):
        group = table[table["weights"] == weights].sort_values("skip")
        if not len(group):
            continue
        skip = 100 * group["skip"]
        for kind, label in CONTENDERS.items():
            left.plot(skip, group[kind], line, marker=marker, ms=4, mfc=fill, color=COLOURS[kind],
                      label=f"{label}, {weights} weights")
        intervals(right, skip, group, "captured", "captured_low", "captured_high", factor=100,
                  fmt=marker + line, mfc=fill, ms=4, label=f"{weights} weights")
    left.set_ylabel("KL from the dense model\n(nats a token)")
    right.axhline(0, color=COLOURS["static"], lw=1)
    right.axhline(100, color=COLOURS["oracle"], lw=1)
    right.set_ylabel("captured headroom (%)\n0 static plan, 100 oracle")
    for axes in (left, right):
        axes.set_xlabel("measured skip (%)")
    legend(picture, [left], columns=2, handlelength=2.6)
    return picture


def _unit_ticks(axes, count: int, always_keep: int, units_per_layer: int) -> None:
    names = unit_names(count, always_keep, units_per_layer)
    axes.set_xticks(range(count), names, rotation=90 * (units_per_layer - 1))


@shipped("predictability", lambda run: (run.metrics["probes"], *_layers(run)))
@drawn
def predictability(rows: list[dict], always_keep: int, units_per_layer: int = 1):
    """R² of harm by depth of the probe, and unit by unit at the router's own input."""
    table = pd.DataFrame(rows)
    picture, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 2.7))
    for probe, colour in (("linear", COLOURS["mean"]), ("MLP", COLOURS["routed"])):
        group = table[table["probe"] == probe].sort_values("depth")
        intervals(left, group["depth"], group, "r2", "r2_low", "r2_high", fmt="o-", color=colour,
                  label=probe)
        for units in group[group["depth"] == always_keep]["by_unit"]:
            right.plot(range(len(units)), units, "o-", color=colour, label=probe)
            _unit_ticks(right, len(units), always_keep, units_per_layer)
    left.axvline(always_keep, color="black", lw=0.8, ls=":")
    left.set_xlabel("probe reads the state after layer ... (dotted: the router's)")
    left.set_ylabel("R² of harm, mean of units")
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="layer", ylabel="R² at the router's input")
    legend(picture, [left])
    return picture


@shipped("difficulty",
          lambda run: (run.metrics["difficulty"], run.metrics["benefit"], *_layers(run)))
@drawn
def difficulty(rows: list[dict], by_unit: list[dict], always_keep: int = 4,
               units_per_layer: int = 1):
    """Rank correlations of depth with difficulty, and of each gate with its own unit's benefit."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 2.6), sharey=True,
                                          width_ratios=[1, 2])
    units = [row for row in by_unit if row["measure"].startswith("unit")]
    summed = [row | {"measure": "benefit"} for row in by_unit if row["measure"] == "all units"]
    whole = rows + summed
    for axes, measures in ((left, whole), (right, units)):
        intervals(axes, np.arange(len(measures)), pd.DataFrame(measures), "correlation")
        axes.axhline(0, color="black", lw=0.8)
    left.set_xticks(range(len(whole)), [row["measure"].replace("dense ", "") for row in whole])
    _unit_ticks(right, len(units), always_keep, units_per_layer)
    left.set_ylabel("rank correlation\n(95 % interval over documents)")
    left.set_xlabel("active layers with ...")
    right.set_xlabel("gate of layer ... with the benefit of that layer")
    return picture


@shipped("position", lambda run: (run.metrics["position"],))
@drawn
def position(rows: list[dict]):
    """Active layers by place in the text, with 95 % intervals over documents."""
    picture, axes = plt.subplots(figsize=(SINGLE, 2.3))
    intervals(axes, np.arange(len(rows)), pd.DataFrame(rows), "mean", fmt="o-")
    names = [f"{row['first']}-{row['last']}" if row["first"] < row["last"] else str(row["first"])
             for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=45)
    axes.set(xlabel="position in the text", ylabel="active layers")
    return picture


# Spaces are shown, and $ would begin mathematics.
SIGNS = str.maketrans({" ": "\u00b7", "\n": r"\n", "\t": r"\t", "$": r"\$"})


@shipped("words", lambda run: (record_of(run), run.metrics["least"]))
@drawn
def words(record: Record, least: int = 10, shown: int = 30):
    """Depth of frequent tokens in their different contexts: quartiles and mean, deepest first."""
    table = same_word(record, least)[0].nlargest(shown, "count")
    table = table.sort_values("mean", ascending=False)
    picture, axes = plt.subplots(figsize=(DOUBLE, 2.4))
    places = np.arange(len(table))
    axes.vlines(places, table["low"], table["high"], color=COLOURS["random"], lw=4)
    axes.plot(places, table["mean"], "o", color=COLOURS["routed"])
    tokens = [token.translate(SIGNS) for token in table["token"]]
    axes.set_xticks(places, tokens, rotation=70)
    axes.set_ylabel("active layers\n(mean, quartiles)")
    return picture
