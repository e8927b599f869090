"""Figures of training runs: variants side by side, the frontier, the steps, single layers."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, SINGLE, drawn, heat, intervals, legend
from dlr.runs import KINDS, Run, alike, kind_of, slug


def _default(phase: str, ending: str, *arguments, replaces: tuple[str, ...] = ()):
    """Registers a figure of the rows of a phase's default run."""
    return figure(phase, run="default", replaces=replaces, files=lambda runs: {
        phase + ending: (run.rows, *arguments) for run in runs.values()})


@_default("token_routing", "", "Token-level routing",
          replaces=("validation_loss_final_bar", "exp7_perplexity_bar"))
@_default("baselines", "", "Baselines", replaces=("validation_loss_final_bar",))
@_default("sequence_routing", "", "Sequence-level routing")
@drawn
def comparison(rows: list[dict], title: str = ""):
    """Perplexity with 95 % intervals beside measured skip, one row a variant."""
    table = pd.DataFrame(rows[::-1])
    colours = [COLOURS[kind_of(row)] for row in rows[::-1]]
    picture, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=[3, 2],
                                          figsize=(DOUBLE, 0.21 * len(rows) + 0.9))
    for place, (row, colour) in enumerate(zip(table.itertuples(), colours)):
        left.errorbar(row.perplexity, place, xerr=[[row.perplexity - row.perplexity_low],
                                                   [row.perplexity_high - row.perplexity]],
                      fmt="o", ms=4, color=colour, capsize=2)
        right.barh(place, 100 * row.skip, color=colour)
        right.text(100 * row.skip + 1, place, f"{100 * row.skip:.1f}", va="center", fontsize=7)
    left.set_yticks(np.arange(len(table)), table["variant"])
    left.set_ylim(-0.7, len(table) - 0.3)
    left.set_xlabel("test perplexity (95 % interval over documents)")
    if table["perplexity"].max() > 4 * table["perplexity"].min():
        left.set_xscale("log")
        left.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        left.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        left.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    right.set_xlabel("measured skip (%)")
    right.set_xlim(0, max(70, 100 * table["skip"].max() + 14))
    picture.suptitle(title)
    return picture


@_default("token_routing", "_keep_rates", 4, "Token-level routing")
@_default("baselines", "_keep_rates", 4, "Baselines")
@_default("sequence_routing", "_keep_rates", 4, "Sequence-level routing")
@drawn
def keep_rates(rows: list[dict], always_keep: int = 4, title: str = ""):
    """Share of tokens that run each routable unit, one row a variant; None without rows."""
    rates = {row["variant"]: row["keep_rate"] for row in rows}
    return heat(rates, rows[0], always_keep, "keep rate", title) if rates else None


def verdicts(runs: dict[str, Run]) -> pd.DataFrame:
    """Router against best static plan, paired, a row a budget; `skip` is the router's."""
    return pd.DataFrame([{"run": name, **difference} for name, run in runs.items()
                         for difference in run.metrics.get("against_static") or ()])


def _lines(axes, table: pd.DataFrame) -> None:
    """Mean perplexity over seeds by measured skip, a line a kind, with one standard deviation."""
    kinds = [kind_of(row) for row in table.to_dict("records")]
    data = table.assign(kind=kinds, budget=table["skip"].round(1))
    for kind, group in data.groupby("kind", sort=False):
        points = group.groupby("budget").agg(skip=("skip", "mean"), mean=("perplexity", "mean"),
                                             spread=("perplexity", "std")).fillna(0.0)
        axes.errorbar(100 * points["skip"], points["mean"], yerr=points["spread"],
                      label=KINDS[kind], color=COLOURS[kind], marker="o", capsize=3,
                      lw=2 if kind in ("routed", "static") else 1,
                      ls="-" if len(points) > 1 else "none")
    axes.set_yscale("log")
    few = table["perplexity"].max() < 10 * table["perplexity"].min()
    if not few:                                  # else the finer ones would run into one another
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter() if few
                                   else matplotlib.ticker.NullFormatter())
    axes.set_ylabel("test perplexity")


def group_names(stem: str, key: tuple[str, str, int]) -> tuple[str, str]:
    """File name and title of a figure of runs that are `alike`."""
    model, dataset, steps = key
    if (model, dataset) == ("nano", "embedded"):
        return stem, "Embedded model"
    return slug(f"{stem}_{model}_{dataset}_{steps}"), f"{model} on {dataset}, {steps} steps"


def frontier_files(runs: dict[str, Run]) -> dict[str, tuple]:
    """The arguments of `frontier` by file, for each group of runs that holds a router."""
    files = {}
    for key, group in alike(runs).items():
        rows = [row for run in group.values() for row in run.rows]
        if any(kind_of(row) == "routed" for row in rows):
            name, title = group_names("pareto", key)
            files[name] = pd.DataFrame(rows), verdicts(group), title
    return files


@figure("pareto", frontier_files, command="python -m dlr sweep params/pareto/nano.yaml --jobs 2",
        replaces=("pareto_frontier_curve",))
@drawn
def frontier(table: pd.DataFrame, differences: pd.DataFrame, title: str = ""):
    """Perplexity by measured skip, and below it DLR less the best static plan, seeds side by side.

    Args:
        table: rows of all runs; lines are means over seeds, with one standard deviation.
        differences: of `verdicts`; a point is a run, with its paired 95 % interval over documents.
    """
    if len(differences):
        picture, (upper, lower) = plt.subplots(2, 1, figsize=(DOUBLE, 5.2), sharex=True,
                                               height_ratios=[5, 2])
        shift = differences.groupby(differences["skip"].round(1)).cumcount() * 0.8
        intervals(lower, 100 * differences["skip"] + shift, differences, "nll_difference", ms=4,
                  capsize=2)
        lower.axhline(0, color=COLOURS["static"], lw=1)
        lower.set_ylabel("DLR - best static\n(nats a token)")
    else:
        picture, upper = plt.subplots(figsize=(DOUBLE, 3.8))
        lower = upper
    lower.set_xlabel("measured skip on the test split (%)")
    _lines(upper, table)
    upper.set_title(title)
    legend(picture, [upper], columns=5)
    return picture


@drawn
def training(logs: dict[str, pd.DataFrame], title: str = ""):
    """Cross-entropy and skip over each variant's steps, with the budget; None without logs."""
    if not logs:
        return None
    picture, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE, 2.9))
    for (name, log), colour in zip(logs.items(), sns.color_palette("colorblind", len(logs))):
        left.plot(log["step"], log["ce"].rolling(5, min_periods=1).mean(), label=name, color=colour)
        right.plot(log["step"], 100 * log["skip"], color=colour)
    goal = 100 * next(iter(logs.values()))["goal"].iloc[-1]
    right.axhline(goal, color="black", lw=0.8, ls=":")
    right.text(0, goal + 1, "target", fontsize=7)
    left.set(xlabel="step", ylabel="training cross-entropy (nats)")
    right.set(xlabel="step", ylabel="skip in training (%)", ylim=(-2, 102))
    legend(picture, [left])
    picture.suptitle(title)
    return picture


@figure("base_model", lambda runs: {"base_model_layers": (run.metrics["layer_harm"], "Base model")
                                    for run in runs.values() if "layer_harm" in run.metrics})
@drawn
def layer_harm(harm: list[float], title: str = ""):
    """Loss added by skipping each single layer."""
    picture, axes = plt.subplots(figsize=(SINGLE, 2.2))
    axes.bar(range(len(harm)), harm, color=COLOURS["routed"])
    axes.set(xlabel="layer skipped", ylabel="loss added (nats a token)", title=title)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if max(harm) > 20 * max(sorted(harm)[len(harm) // 2], 1e-6):
        axes.set_yscale("log")
    return picture


@drawn
def pretraining(history: pd.DataFrame):
    """Training loss by tokens seen, stage by stage."""
    picture, axes = plt.subplots(figsize=(SINGLE, 2.5))
    colours = COLOURS["routed"], COLOURS["static"]
    for (stage, group), colour in zip(history.groupby("stage", sort=False), colours):
        axes.plot(group["tokens"] / 1e6, group["loss"], label=stage, color=colour)
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a token)")
    legend(picture)
    return picture
