"""Figure of the dial: the skip that was asked for, and the skip measured on other text."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from dlr.figures.register import figure
from dlr.figures.style import SINGLE, drawn, legend
from dlr.runs import Run, kind_of


def asked_and_measured(runs: dict[str, Run]) -> pd.DataFrame:
    """A row a dial setting or budget of a router: series (model on dataset), asked, skip."""
    lines = []
    for run in runs.values():
        settings = run.record.get("settings", {})
        series = f"{settings.get('model', '')} on {settings.get('dataset', '')}"
        points = run.metrics.get("dial") or [{"asked": row["target_skip"], "skip": row["skip"]}
                                             for row in run.rows if kind_of(row) == "routed"]
        steps = settings.get("steps", 0)
        lines += [{"series": series, "steps": steps, **point} for point in points]
    return pd.DataFrame(lines)


@figure("pareto", lambda runs: {"calibration": (table,) for table in [asked_and_measured(runs)]
                                if len(table)},
        command="python -m dlr sweep params/pareto/nano.yaml --jobs 2")
@drawn
def calibration(table: pd.DataFrame):
    """Measured skip by the skip asked for, and the difference; the dashes: as asked.

    Args:
        table: columns series, steps, asked, skip; a point a row.
    """
    picture, (upper, lower) = plt.subplots(2, 1, figsize=(SINGLE, 3.6), sharex=True,
                                           height_ratios=[5, 2])
    groups = table.groupby(["series", "steps"], sort=False)
    for ((series, steps), part), marker, colour in zip(
            groups, "os^Dv" * 9, sns.color_palette("colorblind", len(groups))):
        part = part.sort_values("asked")
        look = {"ls": "none", "marker": marker, "ms": 3.5, "color": colour}
        upper.plot(100 * part["asked"], 100 * part["skip"], **look,
                   label=f"{series}, {steps} steps")
        lower.plot(100 * part["asked"], 100 * (part["skip"] - part["asked"]), **look)
    ends = 0, 105 * table[["asked", "skip"]].to_numpy().max()
    upper.plot(ends, ends, "--", color="black", lw=0.8)
    lower.margins(y=0.2)
    lower.axhline(0, color="black", lw=0.8, ls="--")
    upper.set_ylabel("measured skip (%)")
    lower.set(xlabel="skip asked for (%)", ylabel="difference\n(points)")
    legend(picture, columns=1)
    return picture
