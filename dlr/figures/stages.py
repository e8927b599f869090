"""Figure of the stages: what each adds over the one before, by budget."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, drawn, legend

STAGES = ("closed form", "regressed", "in context", "healed", "end to end")


@figure("stages", lambda runs: {f"stage_gains_{name}": (
    run.metrics["gains"], f"{run.record['settings']['model']} on "
    f"{run.record['settings']['dataset']}") for name, run in runs.items()})
@drawn
def stage_gains(gains: list[dict], title: str = ""):
    """Nats a token of each stage less the stage before, with 95 % intervals; a colour a budget."""
    table = pd.DataFrame(gains)
    stages = [stage for stage in STAGES if stage in set(table["stage"])]
    budgets = sorted(table["target_skip"].unique())
    picture, axes = plt.subplots(figsize=(DOUBLE, 3))
    colours = sns.color_palette("viridis_r", len(budgets))
    for number, (budget, colour) in enumerate(zip(budgets, colours)):
        part = table[table["target_skip"] == budget]
        shift = 0.6 * ((number + 0.5) / len(budgets) - 0.5)
        places = [stages.index(stage) + shift for stage in part["stage"]]
        spread = [part["nll_difference"] - part["low"], part["high"] - part["nll_difference"]]
        axes.errorbar(places, part["nll_difference"], yerr=spread, fmt="o", ms=4, capsize=2,
                      color=colour, label=f"{budget:.0%} skipped")
    axes.axhline(0, color=COLOURS["static"], lw=1)
    axes.set_xticks(range(len(stages)), stages)
    axes.set(ylabel="less the stage before\n(nats a token, 95 % interval)", title=title)
    legend(picture)
    return picture
