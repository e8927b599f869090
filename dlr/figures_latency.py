"""Figures of latency tables: speed-up over dense beside the layer-count bound."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dlr.figures import style

COLOURS = {"truncation": "#999999", "masked": "#E69F00", "two-pass": "#CC79A7", "compact": "#0072B2"}


def speedups(table: pd.DataFrame, part: str = "end to end", title: str = ""):
    """Speed-up over dense by system and skip ratio, one panel a kind of work; whiskers are quartiles over the turns.

    Dashes mark the layer-count bound L / (K + R (1 - skip)). Below 1 a system is slower than the dense model.
    """
    style()
    table = table[(table["part"] == part) & (table["system"] != "dense") & (table["skip"] > 0)]
    panels = list(table.groupby(["work", "batch", "length"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + 3.6 * len(panels), 3.4), sharey=True, squeeze=False)
    for place, (((work, batch, length), group), axis) in enumerate(zip(panels, axes[0])):
        skips, systems = sorted(group["skip"].unique()), [s for s in COLOURS if s in set(group["system"])]
        width = 0.8 / len(systems)
        for index, system in enumerate(systems):
            rows = group[group["system"] == system].set_index("skip").loc[skips]
            x = np.arange(len(skips)) + (index - (len(systems) - 1) / 2) * width
            low, high = rows.get("speedup_q1"), rows.get("speedup_q3")
            if low is None:                                # results from before ratios were taken within a turn
                low, high = (rows["speedup"] * rows["median"] / rows[name] for name in ("q3", "q1"))
            error = [rows["speedup"] - low, high - rows["speedup"]]
            axis.bar(x, rows["speedup"], width, color=COLOURS[system], yerr=error,
                     error_kw={"lw": 0.8, "capsize": 2}, label=system if not place else None)
        for x, skip in enumerate(skips):
            bound = group[group["skip"] == skip]["bound"].iloc[0]
            axis.plot([x - 0.45, x + 0.45], [bound, bound], color="black", ls="--", lw=1,
                      label="layer-count bound" if not place and not x else None)
        axis.axhline(1, color="black", lw=0.6)
        axis.set_xticks(range(len(skips)), [f"{skip:.0%}" for skip in skips])
        axis.set_xlabel("skip ratio")
        axis.set_title(f"{work}, batch {batch}, {length} tokens", fontsize=9)
    axes[0, 0].set_ylabel("speed-up over dense")
    figure.legend(frameon=False, fontsize=8, ncol=5, loc="lower center", bbox_to_anchor=(0.5, -0.06))
    figure.suptitle(title)
    figure.tight_layout()
    return figure
