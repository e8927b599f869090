"""Figures of the depth router's start: KL by budget and plan, and by number of labels."""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, SINGLE, drawn, legend
from dlr.runs import Run

_MORE = sns.color_palette("colorblind", 10)
PLANS = {"shuffled": COLOURS["shuffled"], "position alone": _MORE[5], "static": COLOURS["static"],
         "static by domain": _MORE[2],
         "token alone": _MORE[1], "depth router": COLOURS["routed"], "in context": _MORE[9],
         "privileged": _MORE[4], "oracle": "black"}


def _title(run) -> str:
    settings = run.record["settings"]
    return f"{settings['model']} on {settings['dataset']}, not healed"


def _alone(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs that are no point of the sweep over ranks."""
    return {name: run for name, run in runs.items() if "skip_adapter_rank=" not in name}


@figure("depth_router", lambda runs: {f"depth_kl_{name}": (run.rows, _title(run))
                                      for name, run in _alone(runs).items()})
@drawn
def depth_kl(rows: list[dict], title: str = ""):
    """Above, KL from the dense model by skip; below, the difference from the best static plan."""
    table = pd.DataFrame(rows)
    plans = {plan: colour for plan, colour in PLANS.items() if plan in set(table["plan"])}
    picture, (upper, lower) = plt.subplots(2, 1, figsize=(DOUBLE, 5), sharex=True)
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
    legend(picture, [upper])
    return picture


@figure("depth_router", lambda runs: {f"label_scaling_{name}": (run.metrics["scaling"], _title(run))
                                      for name, run in _alone(runs).items()})
@drawn
def label_scaling(scaling: list[dict], title: str = ""):
    """KL of the chosen plans by number of labelled tokens, one line a budget."""
    table = pd.DataFrame(scaling)
    picture, axes = plt.subplots(figsize=(SINGLE, 2.9))
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
    legend(picture, columns=3)
    return picture


def rank_rows(runs: dict[str, Run]) -> list[dict]:
    """Rows of the sweep over ranks of skip adapters, each with its rank."""
    return [row | {"rank": run.record["settings"]["skip_adapter_rank"]}
            for name, run in runs.items() if "skip_adapter_rank=" in name for row in run.rows]


@figure("depth_router", lambda runs: {"adapter_ranks": (rows,)
                                      for rows in [rank_rows(runs)] if rows},
        command="python -m dlr sweep params/depth_router/ranks.yaml")
@drawn
def adapter_ranks(rows: list[dict], title: str = "SmolLM2 on the embedded corpus"):
    """KL of the static plan (dashed) and the depth router (solid) by rank, one colour a budget."""
    table = pd.DataFrame(rows)
    ranks = sorted(table["rank"].unique())
    budgets = sorted(table["budget"].unique())
    picture, axes = plt.subplots(figsize=(SINGLE, 2.9))
    for budget, colour in zip(budgets, sns.color_palette("viridis_r", len(budgets))):
        for plan, line in (("static", "--"), ("depth router", "-")):
            part = table[(table["plan"] == plan) & (table["budget"] == budget)].sort_values("rank")
            axes.plot([ranks.index(rank) for rank in part["rank"]], part["kl"], line, marker="o",
                      ms=3, color=colour, label=f"{budget:.0%}" if line == "-" else None)
    axes.set_xticks(range(len(ranks)), [str(rank) if rank else "none" for rank in ranks])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    picture.suptitle(title)
    axes.set(xlabel="rank of the skip adapters",
             ylabel="KL from the dense model\n(nats a token; dashed: static)")
    legend(picture, columns=5, title="skipped")
    return picture
