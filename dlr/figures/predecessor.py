"""The predecessor's table beside its own published numbers, as ratios to base and dense LoRA."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, drawn, legend
from dlr.measure.evaluate import paired_difference
from dlr.runs import KINDS, Run, alike, slug

# What the predecessor published. Perplexity is its average over batches; skip counts padding.
PUBLISHED = Path(__file__).with_name("published.json")


def table_of(runs: dict[str, Run]) -> pd.DataFrame:
    """Rows of the finished points of one model and data, each beside base and dense LoRA.

    `to_base` and `to_dense` are ratios of perplexity (average over batches) to those of the base
    and of dense LoRA with the same seed, NaN where that point is missing; `gap`, `gap_low` and
    `gap_high` are the loss less dense LoRA's, in nats a token, on the same paragraphs.
    """
    rows = [row | {"run": name} for name, run in runs.items() for row in run.rows]
    base = next((row["perplexity_batches"] for row in rows if row["kind"] == "base"), float("nan"))
    dense = {run.rows[0]["seed"]: run for run in runs.values() if run.rows[0]["kind"] == "dense"}
    for row in rows:
        row["to_base"] = row["perplexity_batches"] / base
        beside = dense.get(row["seed"])
        if beside is not None:
            row["to_dense"] = row["perplexity_batches"] / beside.rows[0]["perplexity_batches"]
            gap = paired_difference(_losses(runs[row["run"]], row["variant"]),
                                    _losses(beside, beside.rows[0]["variant"]))
            row |= {"gap": gap["nll_difference"], "gap_low": gap["low"], "gap_high": gap["high"]}
    return pd.DataFrame(rows)


def _losses(run: Run, variant: str) -> pd.DataFrame:
    nll = run.metrics["nll"][variant]
    return pd.DataFrame({"doc": range(len(nll)), "nll": nll,
                         "predicted": run.metrics["predicted"]})


COLUMNS = ["variant", "trained_skip", "runs", "skip", "skip_padded", "perplexity",
           "perplexity_batches", "to_base", "to_dense"]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row a variant and skip that it was trained for, least skip first."""
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    table = table.assign(runs=1, to_dense=table.get("to_dense", float("nan")))
    means = {name: (name, "sum" if name == "runs" else "mean") for name in COLUMNS[2:]}
    groups = table.groupby(COLUMNS[:2], sort=False)
    return groups.agg(**means).reset_index().sort_values("skip")


def published() -> pd.DataFrame:
    """The predecessor's own rows of seed 42, with the same ratios; `model` names the steps too.

    Where a row was made with several weights, the one that a model's steps are published with.
    """
    known = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = []
    for entry in (known["smollm2-135m"], known["tinyllama"]):
        own = [row for row in entry["rows"] if row["seed"] == 42]
        base = next(row["perplexity"] for row in own if row["variant"] == "base")
        for steps in sorted({row["steps"] for row in own} - {0}):
            of_steps = {}
            for row in own:
                if row["steps"] in (0, steps):
                    of_steps.setdefault(row["variant"], row)
            dense = of_steps["dense LoRA"]["perplexity"]
            rows += [{"model": f"{entry['model']}, {steps} steps", "variant": name,
                      "skip_padded": row["skip"] or 0.0, "perplexity_batches": row["perplexity"],
                      "to_base": row["perplexity"] / base, "to_dense": row["perplexity"] / dense}
                     for name, row in of_steps.items()]
    return pd.DataFrame(rows)


def _files(runs: dict[str, Run]) -> dict[str, tuple]:
    """A figure for each model that has its dense row."""
    files = {}
    for (model, _, steps), group in alike(runs).items():
        table = table_of(group)
        if "to_dense" in table and table["to_dense"].notna().any():
            files[slug(f"predecessor_{model}_{steps}")] = (table, f"{model}, {steps} steps")
    return files


@figure("predecessor", _files, command="python -m dlr sweep "
        "params/predecessor/smollm2-standin.yaml --set dataset=FOLDER")
@drawn
def ratios(table: pd.DataFrame | None, title: str = ""):
    """Perplexity over dense LoRA's by skip of all positions; hollow: as the predecessor published.

    Args:
        table: of `table_of`; a point is a row of one seed. None: the published rows alone.
    """
    picture, axes = plt.subplots(figsize=(DOUBLE, 3.4))
    known = [] if table is None else table.dropna(subset=["to_dense"]).groupby("kind", sort=False)
    for kind, rows in known:
        for (point, part), marker in zip(rows.groupby("point", sort=False), "os^"):
            label = "the predecessor's router" if point == "router" else KINDS[kind]
            axes.plot(100 * part["skip_padded"], part["to_dense"], marker, ls="none",
                      color=COLOURS[kind], label=label)
    for (model, rows), marker in zip(published().groupby("model", sort=False), "Dv<"):
        rows = rows[rows["skip_padded"] > 0]
        axes.plot(100 * rows["skip_padded"], rows["to_dense"], marker, ls="none", mfc="none",
                  color="black", label=f"published, {model}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.axhline(1, color=COLOURS["dense"], lw=1)
    axes.set(xlabel="skip of all positions, padding too (%)", title=title,
             ylabel="perplexity / dense LoRA's")
    legend(picture, columns=1, place="center right")
    return picture
