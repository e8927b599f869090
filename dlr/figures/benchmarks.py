"""Figures of the benchmarks, from metrics.json alone: scores by variant and against skip."""

import matplotlib.pyplot as plt
import pandas as pd

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, SINGLE, drawn, heat, legend
from dlr.runs import KINDS

Z = 1.96                                      # standard errors in half a 95 % interval
CHANCE = {"color": "black", "ls": ":", "lw": 1}


def _scores(rows: list[dict]) -> pd.DataFrame:
    """One line a variant and task, with half-intervals (95 %); perplexities are tasks as well."""
    lines = []
    for row in rows:
        shared = {"variant": row["variant"], "kind": row["kind"]}
        for score in row["scores"]:
            half = Z * (score["stderr"] or 0.0)
            lines.append(shared | {"task": score["task"], "skip": score["skip"],
                                   "metric": score["metric"].split(",")[0], "score": score["score"],
                                   "low": half, "high": half, "chance": score["chance"]})
        for task, measured in row["perplexity"].items():
            value = measured["token_perplexity"]
            lines.append(shared | {"task": task, "skip": row["skip"], "chance": None,
                                   "metric": "perplexity a token", "score": value,
                                   "low": value - measured["token_perplexity_low"],
                                   "high": measured["token_perplexity_high"] - value})
    return pd.DataFrame(lines)


COMMAND = "python -m dlr run evaluation --params params/evaluation/nano.yaml --set data_dir=DIR"


def _compared(ending: str, title: str, measured: str = "variant", replaces: tuple[str, ...] = ()):
    """Registers a figure of every run that compares variants, one of which has `measured`."""
    return figure("evaluation", lambda runs: {
        f"evaluation_{name}_{ending}": (run.rows, title.format(name)) for name, run in runs.items()
        if len(run.rows) > 1 and any(row.get(measured) for row in run.rows)},
        command=COMMAND, replaces=replaces)


@_compared("bars", "Benchmarks: {}", replaces=("exp7_benchmark_accuracy",))
@drawn
def bars(rows: list[dict], title: str = ""):
    """Score of every variant on every task with 95 % intervals; a dotted line marks chance."""
    tasks = list(_scores(rows).groupby("task", sort=False))
    height = 0.5 + len(tasks) * (0.6 + 0.19 * len(rows))
    picture, grid = plt.subplots(len(tasks), 1, figsize=(DOUBLE, height), squeeze=False)
    for axes, (task, part) in zip(grid[:, 0], tasks):
        part = part.iloc[::-1]
        axes.barh(part["variant"], part["score"], xerr=part[["low", "high"]].to_numpy().T,
                  color=list(part["kind"].map(COLOURS)), error_kw={"lw": 1, "capsize": 2})
        chance = part["chance"].iloc[0]
        ends = [1e-3, 1.08 * float((part["score"] + part["high"]).max())]
        if pd.notna(chance):
            axes.axvline(chance, **CHANCE)
            ends.append(1.1 * chance)
        axes.set_xlim(0, max(ends))
        marks = "95 % interval" + "; dotted: chance" * pd.notna(chance)
        axes.set_xlabel(f"{task}: {part['metric'].iloc[0]} ({marks})")
    picture.suptitle(title)
    return picture


@_compared("scatter", "Benchmarks: {}", replaces=("exp7_efficiency_scatter",))
@drawn
def scatter(rows: list[dict], title: str = ""):
    """Score against the skip ratio measured on the scored tokens of the task, one panel a task."""
    tasks = list(_scores(rows).groupby("task", sort=False))
    lines, columns = -(-len(tasks) // 3), min(3, len(tasks))
    picture, grid = plt.subplots(lines, columns, figsize=(SINGLE if columns == 1 else DOUBLE,
                                                          0.5 + 2.3 * lines), squeeze=False)
    for axes in grid.flat[len(tasks):]:
        axes.set_visible(False)
    for axes, (task, part) in zip(grid.flat, tasks):
        for row in part.itertuples():
            axes.errorbar(100 * row.skip, row.score, yerr=[[row.low], [row.high]], fmt="o", ms=4,
                          capsize=2, color=COLOURS[row.kind], label=KINDS[row.kind])
        chance = part["chance"].iloc[0]
        if pd.notna(chance):
            axes.axhline(chance, **CHANCE)
        axes.set_xlabel("measured skip on scored tokens (%)")
        axes.set_ylabel(f"{task}: {part['metric'].iloc[0]}")
    legend(picture)
    picture.suptitle(title)
    return picture


def groups(rows: list[dict]) -> list[str]:
    """The tasks of a run that are groups of others with one metric."""
    return [score["task"] for score in rows[0]["scores"] if score.get("tasks", 1) > 1]


@figure("evaluation", lambda runs: {
    f"evaluation_{name}_{group}": (run.rows, run.metrics["harness"], group)
    for name, run in runs.items() if len(run.rows) > 1 for group in groups(run.rows)},
    command=COMMAND)
@drawn
def group_tasks(rows: list[dict], harness: dict, group: str):
    """Every task of a group, sorted by the first row's score: one dot a variant; dotted: chance.

    Args:
        harness: the harness's whole result by variant, as metrics.json keeps it.
    """
    whole = next(score for score in rows[0]["scores"] if score["task"] == group)
    metric = whole["metric"]
    first = harness[rows[0]["variant"]]
    leaves = sorted(first["group_subtasks"][group], key=lambda leaf: first["results"][leaf][metric])
    common = group + "_" if all(leaf.startswith(group + "_") for leaf in leaves) else ""
    picture, axes = plt.subplots(figsize=(DOUBLE, 0.125 * len(leaves) + 1.1))
    for row, marker in zip(rows, "|o^sDvP*X"):
        results = [harness[row["variant"]]["results"][leaf] for leaf in leaves]
        errors = [Z * result[metric.replace(",", "_stderr,")] for result in results]
        axes.errorbar([result[metric] for result in results], range(len(leaves)), xerr=errors,
                      fmt=marker, color=COLOURS[row["kind"]], ms=6 if row is rows[0] else 3.5,
                      elinewidth=0.5, alpha=0.8, label=row["variant"])
    if whole["chance"] is not None:
        axes.axvline(whole["chance"], **CHANCE)
    names = [leaf.removeprefix(common) for leaf in leaves]
    axes.set_yticks(range(len(leaves)), names, fontsize=6)
    axes.set_ylim(-0.8, len(leaves) - 0.2)
    axes.grid(axis="y", lw=0.3)
    axes.set_xlabel(f"{metric.split(',')[0]} (95 % interval; dotted: chance)")
    legend(picture, columns=5)
    axes.set_title(group)
    return picture


@_compared("layers", "Layers skipped: {}", "keep_rate")
@drawn
def layer_skips(rows: list[dict], title: str = "", always_keep: int = 4):
    """Share of scored tokens that skip each unit, a line a variant that skips any; or None."""
    skipping = [row for row in rows if row["keep_rate"]]
    rates = {row["variant"]: [1 - rate for rate in row["keep_rate"]] for row in skipping}
    return heat(rates, skipping[0], always_keep, "skip rate", title) if rates else None


@_compared("agreement", "Greedy text beside the base model's: {}", "agreement")
@drawn
def agreements(rows: list[dict], title: str = ""):
    """Equal tokens in front, and KL along both texts, with 95 % intervals; or None."""
    shown = [row for row in reversed(rows) if row.get("agreement")]
    if not shown:
        return None
    picture, (left, right) = plt.subplots(1, 2, sharey=True,
                                          figsize=(DOUBLE, 1 + 0.22 * len(shown)))
    panels = [(left, "agreed_tokens", "full"), (right, "kl", "full"),
              (right, "kl_own_text", "none")]
    for place, row in enumerate(shown):
        table = pd.DataFrame([row["agreement"]])
        for axes, name, fill in panels:
            value = table[name]
            axes.errorbar(value, [place], xerr=[value - table[f"{name}_low"],
                                                table[f"{name}_high"] - value],
                          fmt="o", capsize=3, color=COLOURS[row["kind"]], fillstyle=fill)
    left.set_yticks(range(len(shown)), [row["variant"] for row in shown])
    left.set_ylim(-0.6, len(shown) - 0.4)
    left.set_xlabel(f"tokens agreed, of {shown[0]['agreement']['tokens']}")
    right.set_xlabel("KL a token, nats (hollow: along its own text)")
    picture.suptitle(title)
    return picture
