"""Figures of the depth router's start: KL by budget and plan, and by number of labels."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import drawn

ORDER = ("static", "shuffled", "position alone", "token alone", "depth router", "in context",
         "privileged", "oracle")


@figure("depth_router", lambda runs: {f"depth_kl_{name}": (run.rows, name)
                                      for name, run in runs.items()})
@drawn
def depth_kl(rows: list[dict], title: str = ""):
    """Above, KL from the dense model by skip; below, the difference from the best static plan."""
    table = pd.DataFrame(rows)
    plans = [plan for plan in ORDER if plan in set(table["plan"])]
    colours = dict(zip(ORDER, sns.color_palette("colorblind", len(ORDER))))
    picture, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 6.4), sharex=True)
    for plan in plans:
        part = table[table["plan"] == plan].sort_values("budget")
        skip, colour = 100 * part["budget"], colours[plan]
        upper.plot(skip, part["kl"], marker="o", ms=3, color=colour, label=plan)
        if plan != "static":
            lower.plot(skip, part["difference"], marker="o", ms=3, color=colour)
            lower.fill_between(skip, part["difference_low"], part["difference_high"], color=colour,
                               alpha=0.2, lw=0)
    lower.axhline(0, color=colours["static"], lw=1)
    upper.set(ylabel="KL from the dense model\n(nats a token)", title=title)
    lower.set(xlabel="skip of routable layers (%)", ylabel="difference from static\n(nats a token)")
    upper.legend(frameon=False, fontsize=8)
    return picture


@figure("depth_router", lambda runs: {f"label_scaling_{name}": (run.metrics["scaling"], run.rows,
                                                                name)
                                      for name, run in runs.items()})
@drawn
def label_scaling(scaling: list[dict], rows: list[dict], title: str = ""):
    """KL of the chosen plans by number of labelled tokens, one line a budget; static is dotted."""
    table = pd.DataFrame(scaling)
    picture, axes = plt.subplots(figsize=(6.4, 3.6))
    budgets = sorted(table["budget"].unique())
    for budget, colour in zip(budgets, sns.color_palette("viridis", len(budgets))):
        part = table[table["budget"] == budget].sort_values("labels")
        axes.plot(part["labels"], part["kl"], marker="o", ms=3, color=colour,
                  label=f"{budget:.0%} skipped")
    axes.set_xscale("log")
    axes.set(xlabel="labelled tokens", ylabel="KL of the chosen plans\n(nats a token)", title=title)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
