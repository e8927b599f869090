"""The router against the best static plan, domain by domain: `domains` in a run's metrics.

    metrics["domains"] = domain_differences(routed, static, documents.domains)
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, SINGLE, drawn, legend
from dlr.runs import Run, alike, slug

def domain_records(runs: dict[str, Run]) -> list[dict]:
    """The rows by domain of all runs that have them, each with its target skip."""
    return [{"target_skip": run.record.get("settings", {}).get("target_skip")} | row
            for run in runs.values() for row in run.metrics.get("domains") or ()]


@figure("pareto", lambda runs: {
    slug(f"pareto_domains_{model}_{dataset}_{steps}"): (records,)
    for (model, dataset, steps), group in alike(runs).items()
    if (records := domain_records(group))}, reads=("metrics.json", "run.json"),
    command="python -m dlr sweep params/pareto/smollm2-cpu.yaml")
@drawn
def domains_against_static(rows: list[dict], title: str = ""):
    """Nats a token against the best static plan, with 95 % intervals: a line a domain.

    Args:
        rows: domain, nll_difference, low, high; where they have a target_skip, a colour each.
            Rows of one domain and target, as of several seeds, lie side by side.
    """
    table = pd.DataFrame(rows)
    targets = table.get("target_skip", pd.Series(np.nan, table.index)).fillna(-1.0)
    names = sorted(table["domain"].unique(), reverse=True)
    budgets = sorted(targets.unique())
    colours = ([COLOURS["routed"]] if len(budgets) == 1
               else sns.color_palette("viridis_r", len(budgets)))
    turn = table.assign(target=targets).sort_values("target", kind="stable").groupby(
        "domain").cumcount()
    lines = int(turn.max()) + 1
    picture, axes = plt.subplots(figsize=(DOUBLE, 0.9 + len(names) * (0.22 + 0.07 * lines)))
    for budget, colour in zip(budgets, colours):
        part = table[targets == budget]
        places = [names.index(name) for name in part["domain"]]
        shift = 0.7 * (0.5 - (turn[part.index] + 0.5) / lines)
        spread = [part["nll_difference"] - part["low"], part["high"] - part["nll_difference"]]
        axes.errorbar(part["nll_difference"], places + shift, xerr=spread, fmt="o", ms=4, capsize=2,
                      color=colour, label=f"{100 * budget:.0f} % asked")
    axes.axvline(0, color=COLOURS["static"], lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set(xlabel="DLR - best static (nats a token, 95 % interval over documents)", title=title)
    if budgets[0] >= 0:
        legend(picture)
    return picture


@figure("pareto", lambda runs: {
    slug(f"depth_domains_{model}_{dataset}_{steps}"): (rows,)
    for (model, dataset, steps), group in alike(runs).items()
    if (rows := [row for row in domain_records(group) if "skip" in row])},
    reads=("metrics.json", "run.json"),
    command="python -m dlr run pareto --set point=router --set dataset=mixture --name mixture")
@drawn
def depth_by_domain(rows: list[dict], title: str = ""):
    """Share of the routable layers that the router runs in each domain, at one price for all.

    Args:
        rows: domain, target_skip, skip; a line a target, of several seeds their mean.
    """
    skips = pd.DataFrame(rows).groupby(["target_skip", "domain"])["skip"].mean()
    table = 100 * (1 - skips.unstack())
    table = table[table.mean().sort_values().index]
    picture, axes = plt.subplots(figsize=(SINGLE, 2.6))
    for (budget, depths), colour in zip(table.iterrows(),
                                        sns.color_palette("viridis_r", len(table))):
        axes.plot(depths, range(len(depths)), "o-", ms=4, color=colour,
                  label=f"{100 * budget:.0f} % asked")
    axes.set_yticks(range(table.shape[1]), table.columns)
    axes.set_ylim(-0.5, table.shape[1] - 0.5)
    axes.set(xlabel="routable layers that run (%)", title=title)
    legend(picture)
    return picture
