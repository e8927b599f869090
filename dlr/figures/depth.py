"""Figures of the depth router's start: KL by budget and plan, and by number of labels."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, drawn

_MORE = sns.color_palette("colorblind", 10)
PLANS = {"shuffled": COLOURS["shuffled"], "position alone": _MORE[5], "static": COLOURS["static"],
         "token alone": _MORE[1], "depth router": COLOURS["routed"], "in context": _MORE[9],
         "privileged": _MORE[4], "oracle": "black"}


def _title(run) -> str:
    settings = run.record["settings"]
    return f"{settings['model']} on {settings['dataset']}, not healed"


@figure("depth_router", lambda runs: {f"depth_kl_{name}": (run.rows, _title(run))
                                      for name, run in runs.items()})
@drawn
def depth_kl(rows: list[dict], title: str = ""):
    """Above, KL from the dense model by skip; below, the difference from the best static plan."""
    table = pd.DataFrame(rows)
    plans = {plan: colour for plan, colour in PLANS.items() if plan in set(table["plan"])}
    picture, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 6.4), sharex=True)
    for plan, colour in plans.items():
        part = table[table["plan"] == plan].sort_values("budget")
        skip = 100 * part["budget"]
        upper.plot(skip, part["kl"], marker="o", ms=3, color=colour, label=plan)
        if plan != "static":
            lower.plot(skip, part["difference"], marker="o", ms=3, color=colour)
            lower.fill_between(skip, part["difference_low"], part["difference_high"], color=colour,
                               alpha=0.2, lw=0)
    lower.axhline(0, color=COLOURS["static"], lw=1)
    upper.set(ylabel="KL from the dense model\n(nats a token)", title=title)
    lower.set(xlabel="skip of routable layers (%)", ylabel="difference from static\n(nats a token)")
    upper.legend(frameon=False, fontsize=8)
    return picture


@figure("depth_router", lambda runs: {f"label_scaling_{name}": (run.metrics["scaling"], _title(run))
                                      for name, run in runs.items()})
@drawn
def label_scaling(scaling: list[dict], title: str = ""):
    """KL of the chosen plans by number of labelled tokens, one line a budget."""
    table = pd.DataFrame(scaling)
    picture, axes = plt.subplots(figsize=(6.4, 3.6))
    budgets = sorted(table["budget"].unique())
    for budget, colour in zip(budgets, sns.color_palette("viridis", len(budgets))):
        part = table[table["budget"] == budget].sort_values("labels")
        axes.plot(part["labels"], part["kl"], marker="o", ms=3, color=colour,
                  label=f"{budget:.0%} skipped")
    counts = sorted(table["labels"].unique())
    axes.set_xscale("log")
    axes.minorticks_off()
    apart = [count for count, following in zip(counts, [*counts[1:], float("inf")])
             if following > 1.5 * count]
    axes.set_xticks(apart, [f"{count / 1000:.3g}k" for count in apart])
    axes.set(xlabel="labelled tokens", ylabel="KL of the chosen plans\n(nats a token)", title=title)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
