"""Figures of latency tables: speed-up over dense beside the layer-count bound."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dlr.figures.register import figure
from dlr.figures.style import DOUBLE, drawn, legend
from dlr.runs import Run

SYSTEMS = {"truncation": "#999999", "masked": "#E69F00", "two-pass": "#CC79A7",
           "compact": "#0072B2"}


def _bars(axes, group: pd.DataFrame, first: bool) -> None:
    """A panel: one bar a system and skip ratio, the bound of each ratio; `first` labels them."""
    skips = sorted(group["skip"].unique())
    systems = [system for system in SYSTEMS if system in set(group["system"])]
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        rows = group[group["system"] == system].set_index("skip").loc[skips]
        places = np.arange(len(skips)) + (index - (len(systems) - 1) / 2) * width
        low, high = rows.get("speedup_q1"), rows.get("speedup_q3")
        if low is None:                # results from before ratios were taken within a turn
            low, high = (rows["speedup"] * rows["median"] / rows[name] for name in ("q3", "q1"))
        axes.bar(places, rows["speedup"], width, color=SYSTEMS[system],
                 yerr=[rows["speedup"] - low, high - rows["speedup"]],
                 error_kw={"lw": 0.8, "capsize": 2}, label=system if first else None)
    for place, skip in enumerate(skips):
        bound = group[group["skip"] == skip]["bound"].iloc[0]
        axes.plot([place - 0.45, place + 0.45], [bound, bound], color="black", ls="--", lw=1,
                  label="layer-count bound" if first and not place else None)
    axes.axhline(1, color="black", lw=0.6)
    axes.set_xticks(range(len(skips)), [f"{skip:.0%}" for skip in skips])
    axes.set_xlabel("skip ratio")


def _title(run: Run) -> str:
    """The model and the machine of a run."""
    row, hardware = run.rows[0], run.record["hardware"]
    machine = hardware["accelerator"] or hardware["processor"]
    return f"{row['model']}, {row['layers']} layers, {row['dtype']}, {machine}"


@figure("latency", lambda runs: {f"latency_{name}": (run.rows, _title(run))
                                 for name, run in runs.items()}, reads=("metrics.json", "run.json"),
        replaces=("inference_speedup_bar",))
@drawn
def speedups(rows: list[dict], title: str = "", part: str = "end to end"):
    """Speed-up over dense by system and skip ratio, one panel a kind of work.

    Whiskers are quartiles over the turns, dashes mark the layer-count bound L / (K + R (1 - skip)).
    Below 1 a system is slower than the dense model.
    """
    table = pd.DataFrame(rows)
    table = table[(table["part"] == part) & (table["system"] != "dense") & (table["skip"] > 0)]
    panels = list(table.groupby(["work", "batch", "length"], sort=False))
    lines, columns = -(-len(panels) // 3), min(3, len(panels))
    picture, grid = plt.subplots(lines, columns, figsize=(DOUBLE, 0.7 + 2.1 * lines), sharey=True,
                                 squeeze=False)
    for place, ((work, batch, length), group) in enumerate(panels):
        _bars(grid.flat[place], group, first=not place)
        grid.flat[place].set_title(f"{work}, batch {batch}, {length} tokens")
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over dense")
    legend(picture, columns=5)
    picture.suptitle(title)
    return picture
