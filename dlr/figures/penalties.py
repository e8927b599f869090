"""Figures of routers under a penalty on the layers run: what each penalty ends at."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, SINGLE, drawn, legend
from dlr.runs import Run, kind_of, slug

SWEPT = "sequence_routing", "token_routing"
COMMAND = "python -m dlr run sequence_routing --set model=smollm2"


def penalised(runs: dict[str, Run]) -> pd.DataFrame:
    """A row a penalty: model, level, penalty, active_layers, share of routable layers run, loss.

    Rows of notebook 02 name their penalty; runs of a sweep of notebook 03 are named by it.
    Losses, in nats a token, have an interval: low, high.

    Args:
        runs: by phase/name.
    """
    lines = []
    for name, run in runs.items():
        settings = run.record.get("settings", {})
        for row in run.rows:
            penalty = row["variant"].partition("lambda = ")[2]
            if not penalty and "penalty=" in name and row["variant"] == "v1":
                penalty = settings["penalty"]
            if penalty and kind_of(row) == "routed":
                low, loss, high = (np.log(row[f"perplexity{end}"]) for end in ("_low", "", "_high"))
                lines.append({"model": settings.get("model", ""),
                              "level": name.partition("_")[0] + "s", "penalty": float(penalty),
                              "active_layers": row["active_layers"], "share": 1 - row["skip"],
                              "loss": loss, "low": low, "high": high})
    return pd.DataFrame(lines)


def _series(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Means over seeds by penalty, for each model and level that has several penalties."""
    means = {key: part.groupby("penalty")[["active_layers", "share", "loss", "low", "high"]].mean()
             for key, part in (table.groupby(["model", "level"]) if len(table) else ())}
    return {key: part for key, part in means.items() if len(part) > 1}


def _penalty_axis(axes, penalties) -> None:
    axes.set_xscale("log")
    axes.set_xticks(penalties, [f"{penalty:g}" for penalty in penalties])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("penalty \u03bb on the mean gate")


@figure(SWEPT, lambda runs: {
    slug(f"penalties_{model}_{level}"): (part, f"{model}: {level} routed under a penalty")
    for (model, level), part in _series(penalised(runs)).items()},
    reads=("metrics.json", "run.json"), command="python -m dlr run sequence_routing",
    replaces=("pareto_dual_axis", "pareto_sweep_bar"))
@drawn
def penalties(table: pd.DataFrame, title: str = ""):
    """Active layers and test loss by penalty, on twin axes; bars are 95 % intervals.

    Args:
        table: active_layers, loss, low, high by penalty.
    """
    picture, left = plt.subplots(figsize=(SINGLE, 2.6))
    left.plot(table.index, table["active_layers"], "o-", ms=4, color=COLOURS["routed"],
              label="active layers (left)")
    left.set_ylim(0, 1.1 * table["active_layers"].max())
    left.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    left.set_ylabel("active layers")
    right = left.twinx()
    right.spines["right"].set_visible(True)
    spread = [table["loss"] - table["low"], table["high"] - table["loss"]]
    right.errorbar(table.index, table["loss"], yerr=spread, fmt="s--", ms=4, capsize=2,
                   color=COLOURS["static"], label="test loss (right)")
    right.set_ylabel("test loss (nats a token)")
    _penalty_axis(left, table.index)
    left.set_title(title)
    legend(picture)
    return picture


@figure(SWEPT, lambda runs: {"phase_transition": (series,)
                             for series in [_series(penalised(runs))] if series},
        reads=("metrics.json", "run.json"), command=COMMAND,
        replaces=("phase_transition_comparison",))
@drawn
def phase_transition(series: dict[tuple[str, str], pd.DataFrame]):
    """Share of the routable layers that run, by penalty: a line a model and level of routing."""
    picture, axes = plt.subplots(figsize=(SINGLE, 2.6))
    colours = sns.color_palette("colorblind", len(series))
    for ((model, level), part), colour, marker in zip(series.items(), colours, "os^Dv" * 9):
        axes.plot(part.index, 100 * part["share"], marker=marker, ms=4, color=colour,
                  label=f"{model}, {level}")
    _penalty_axis(axes, sorted({penalty for part in series.values() for penalty in part.index}))
    axes.set(ylabel="routable layers that run (%)", ylim=(0, 104))
    legend(picture)
    return picture
