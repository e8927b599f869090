"""Figures of the token analysis, drawn from a run's saved records and metrics alone; no model runs.

    python -m dlr.figures_analysis results/token_analysis/nano        # redraws one run's figures
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.figures import COLOURS, save, style, unit_names
from dlr.record import Record
from dlr.runs import results_folder

ORACLE = "#009E73"


def _interval(axes, x, rows: pd.DataFrame, middle: str, low: str, high: str, **options):
    """Points with their intervals."""
    spread = [(rows[middle] - rows[low]).clip(lower=0), (rows[high] - rows[middle]).clip(lower=0)]
    axes.errorbar(x, rows[middle], yerr=spread, capsize=3, **options)


def category_depth(table: pd.DataFrame, always_keep: int = 4, units_per_layer: int = 1):
    """Mean active layers a category with 95 % intervals, and its keep rates layer by layer."""
    style()
    rows = table[table["tokens"] > 0].sort_values("active_layers").reset_index(drop=True)
    keep = rows.filter(like="keep_")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.3 * len(rows) + 1.4), sharey=True,
                                         gridspec_kw={"width_ratios": [2, 3]})
    places = np.arange(len(rows)) + 0.5
    spread = [rows["active_layers"] - rows["low"], rows["high"] - rows["active_layers"]]
    left.errorbar(rows["active_layers"], places, xerr=spread, fmt="o", capsize=3, color=COLOURS["DLR"])
    left.axvline(float(rows.loc[rows["category"] == "all", "active_layers"].iloc[0]), color="black", lw=0.8, ls=":")
    left.set_xlabel("active layers (95 % interval over documents)")
    sns.heatmap(keep.to_numpy(), ax=right, vmin=0, vmax=1, cmap="cividis", cbar_kws={"label": "keep rate"},
                xticklabels=unit_names(keep.shape[1], always_keep, units_per_layer))
    right.set_xlabel("layer")
    left.set_yticks(places, [f"{r.category} ({r.tokens:,})" for r in rows.itertuples()])
    figure.suptitle("Depth by category of the token read")
    figure.tight_layout()
    return figure


def headroom(rows: list[dict]):
    """KL of static plan, router and oracle against skip, and the share of the headroom that the router captures."""
    style()
    table = pd.DataFrame(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for weights, line, marker in (("checkpoint", "-", "o"), ("base", "--", "s")):
        group = table[table["weights"] == weights].sort_values("skip")
        if not len(group):
            continue
        for name, label, colour in (("static", "best static plan", COLOURS["best static"]),
                                    ("routed", "router", COLOURS["DLR"]), ("oracle", "per-token oracle", ORACLE)):
            left.plot(100 * group["skip"], group[name], line, marker=marker, ms=4, color=colour,
                      label=f"{label}, {weights} weights")
        _interval(right, 100 * group["skip"], 100 * group[["captured", "captured_low", "captured_high"]], "captured",
                  "captured_low", "captured_high", fmt=marker + line, color=COLOURS["DLR"], label=f"{weights} weights")
    left.set_ylabel("KL from the dense model\n(nats a token)")
    right.axhline(0, color=COLOURS["best static"], lw=1)
    right.axhline(100, color=ORACLE, lw=1)
    right.set_ylabel("captured headroom (%)\n0 static plan, 100 oracle")
    for axes in (left, right):
        axes.set_xlabel("measured skip (%)")
        axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def predictability(rows: list[dict], always_keep: int, units_per_layer: int = 1):
    """R² of harm by depth of the probe, and unit by unit at the router's own input."""
    style()
    table = pd.DataFrame(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for kind, colour in zip(("linear", "MLP"), (COLOURS["mean plan"], COLOURS["DLR"])):
        group = table[table["probe"] == kind].sort_values("depth")
        _interval(left, group["depth"], group, "r2", "r2_low", "r2_high", fmt="o-", color=colour, label=kind)
        own = group[group["depth"] == always_keep]
        if len(own):
            units = own["by_unit"].iloc[0]
            right.plot(range(len(units)), units, "o-", color=colour, label=kind)
            right.set_xticks(range(len(units)), unit_names(len(units), always_keep, units_per_layer),
                             rotation=90 * (units_per_layer - 1))
    left.axvline(always_keep, color="black", lw=0.8, ls=":")
    left.set_xlabel("probe reads the state after layer ... (dotted: the router's)")
    left.set_ylabel("R² of harm, mean of units")
    right.axhline(0, color="black", lw=0.8)
    right.set_xlabel("layer")
    right.set_ylabel("R² at the router's input")
    left.legend(frameon=False)
    figure.tight_layout()
    return figure


def difficulty(rows: list[dict], by_unit: list[dict], always_keep: int = 4, units_per_layer: int = 1):
    """Rank correlations of depth with difficulty, and of each gate with the benefit of its own unit."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), gridspec_kw={"width_ratios": [1, 2]}, sharey=True)
    units = [row for row in by_unit if row["measure"].startswith("unit")]
    whole = pd.DataFrame(rows + [{**row, "measure": "benefit"} for row in by_unit if row["measure"] == "all units"])
    for axes, table in ((left, whole), (right, pd.DataFrame(units))):
        _interval(axes, np.arange(len(table)), table, "correlation", "low", "high", fmt="o", color=COLOURS["DLR"])
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(table)), table["measure"].str.replace("dense ", ""))
    right.set_xticks(range(len(units)), unit_names(len(units), always_keep, units_per_layer),
                     rotation=90 * (units_per_layer - 1))
    left.set_ylabel("rank correlation\n(95 % interval over documents)")
    left.set_xlabel("active layers with ...")
    right.set_xlabel("gate of layer ... with the benefit of that layer")
    figure.tight_layout()
    return figure


def position(rows: list[dict]):
    """Active layers by place in the text."""
    style()
    table = pd.DataFrame(rows)
    figure, axes = plt.subplots(figsize=(5, 2.8))
    _interval(axes, np.arange(len(table)), table, "mean", "low", "high", fmt="o-", color=COLOURS["DLR"])
    names = [f"{a}-{b}" if a != b else str(a) for a, b in zip(table["first"], table["last"])]
    axes.set_xticks(range(len(table)), names)
    axes.set_xlabel("position in the text")
    axes.set_ylabel("active layers")
    figure.tight_layout()
    return figure


def _shown(token: str) -> str:
    """A token's text on an axis: spaces as middle dots, no mathematics."""
    return token.replace(" ", "\u00b7").replace("\n", r"\n").replace("\t", r"\t").replace("$", r"\$")


def words(record: Record, least: int = 10, shown: int = 30):
    """Depth of frequent tokens in their different contexts: quartiles and mean, deepest first."""
    from dlr.analysis import same_word
    style()
    table = same_word(record, least)[0].nlargest(shown, "count").sort_values("mean", ascending=False)
    figure, axes = plt.subplots(figsize=(9, 3))
    places = np.arange(len(table))
    axes.vlines(places, table["low"], table["high"], color=COLOURS["random plan"], lw=4)
    axes.plot(places, table["mean"], "o", color=COLOURS["DLR"])
    axes.set_xticks(places, [_shown(token) for token in table["token"]], rotation=70, fontsize=8)
    axes.set_ylabel("active layers\n(mean, quartiles)")
    figure.tight_layout()
    return figure


def draw(run: Path, folder: Path | None = None, prefix: str = "") -> list[Path]:
    """All figures of a finished run, into its folder or another one.

    Raises:
        FileNotFoundError: the run has no metrics.json or no record.
    """
    if not (run / "metrics.json").is_file():
        raise FileNotFoundError(f"{str(run)!r} has no metrics.json, so that run is not finished; give it again: "
                                "python -m dlr run token_analysis")
    metrics, record = json.loads((run / "metrics.json").read_text(encoding="utf-8")), Record.load(run / "record")
    layers = record.meta["always_keep"], record.meta["units_per_layer"]
    found = {"category_depth": category_depth(pd.DataFrame(metrics["categories"]), *layers),
             "headroom": headroom(metrics["rows"]),
             "predictability": predictability(metrics["probes"], *layers),
             "difficulty": difficulty(metrics["difficulty"], metrics["benefit"], *layers),
             "position": position(metrics["position"]), "words": words(record, metrics["least"])}
    return [save(figure, folder or run, prefix + name) for name, figure in found.items()]


def redraw_all(folder: Path) -> list[Path]:
    """figures/ from the committed run of the embedded router, where it is there."""
    run = results_folder() / "token_analysis" / "nano"
    return draw(run, folder, "token_analysis_") if (run / "metrics.json").is_file() else []


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1])):
        print(path)
