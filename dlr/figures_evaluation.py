"""Figures of the benchmarks: scores by variant, and score against measured skip. Made from metrics.json rows alone."""

import matplotlib.pyplot as plt
import pandas as pd

from dlr.figures import COLOURS, KINDS, heat, style, unit_names

Z = 1.96


def _scores(rows: list[dict]) -> pd.DataFrame:
    """One line a variant and task, with 95 % intervals; perplexities are tasks as well."""
    lines = []
    for row in rows:
        shared = {"variant": row["variant"], "kind": row["kind"], "skip": row["skip"]}
        for score in row["scores"]:
            half = Z * (score["stderr"] or 0.0)
            lines.append(shared | {"task": score["task"], "skip": score["skip"], "metric": score["metric"].split(",")[0],
                                   "score": score["score"], "low": half, "high": half, "chance": score["chance"]})
        for task, found in row["perplexity"].items():
            value = found["token_perplexity"]
            lines.append(shared | {"task": task, "metric": "perplexity a token", "score": value, "chance": None,
                                   "low": value - found["token_perplexity_low"],
                                   "high": found["token_perplexity_high"] - value})
    return pd.DataFrame(lines)


def bars(rows: list[dict], title: str = ""):
    """Score of every variant on every task with 95 % intervals; a dotted line marks chance."""
    style()
    table = _scores(rows)
    tasks = list(table["task"].unique())
    figure, grid = plt.subplots(len(tasks), 1, figsize=(7, 0.9 + len(tasks) * (0.7 + 0.28 * len(rows))), squeeze=False)
    for axes, task in zip(grid[:, 0], tasks):
        part = table[table["task"] == task].iloc[::-1]
        errors = part[["low", "high"]].to_numpy().T
        axes.barh(part["variant"], part["score"], xerr=errors, color=[COLOURS[KINDS[k]] for k in part["kind"]],
                  error_kw={"lw": 1, "capsize": 2})
        chance = part["chance"].iloc[0]
        if pd.notna(chance):
            axes.axvline(chance, color="black", ls=":", lw=1)
        axes.set_xlim(0, max(1e-3, 1.08 * float((part["score"] + part["high"]).max()), 1.1 * chance if pd.notna(chance) else 0))
        axes.set_xlabel(f"{task}: {part['metric'].iloc[0]} (95 % interval; dotted: chance)")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def scatter(rows: list[dict], title: str = ""):
    """Score against the skip ratio measured on the scored tokens of the task, one panel a task."""
    style()
    table = _scores(rows)
    tasks = list(table["task"].unique())
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), squeeze=False)
    for axes, task in zip(grid[0], tasks):
        for row in table[table["task"] == task].itertuples():
            axes.errorbar(100 * row.skip, row.score, yerr=[[row.low], [row.high]], fmt="o", capsize=2,
                          color=COLOURS[KINDS[row.kind]], label=KINDS[row.kind])
        chance = table.loc[table["task"] == task, "chance"].iloc[0]
        if pd.notna(chance):
            axes.axhline(chance, color="black", ls=":", lw=1)
        axes.set_xlabel("measured skip on scored tokens (%)")
        axes.set_ylabel(f"{task}: {table.loc[table['task'] == task, 'metric'].iloc[0]}")
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1]))
        axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def groups(rows: list[dict]) -> list[str]:
    """The tasks of a run that are groups of others with one metric."""
    return [score["task"] for score in rows[0]["scores"] if score.get("tasks", 1) > 1]


def group_tasks(rows: list[dict], harness: dict, group: str):
    """Every task of a group, sorted by the first row's score: one dot a variant, with 95 % intervals; dotted: chance.

    Args:
        harness: the harness's whole result by variant, as metrics.json keeps it.
    """
    style()
    metric, chance = next((s["metric"], s["chance"]) for s in rows[0]["scores"] if s["task"] == group)
    leaves = harness[rows[0]["variant"]]["group_subtasks"][group]
    found = {row["variant"]: harness[row["variant"]]["results"] for row in rows}
    leaves = sorted(leaves, key=lambda leaf: found[rows[0]["variant"]][leaf][metric])
    common = group + "_" if all(leaf.startswith(group + "_") for leaf in leaves) else ""
    figure, axes = plt.subplots(figsize=(7.5, 0.19 * len(leaves) + 1.4))
    markers = dict(zip(found, "|o^sDvP*X"))
    for row in rows:
        results = found[row["variant"]]
        errors = [Z * results[leaf][metric.replace(",", "_stderr,")] for leaf in leaves]
        axes.errorbar([results[leaf][metric] for leaf in leaves], range(len(leaves)), xerr=errors, fmt=markers[row["variant"]],
                      color=COLOURS[KINDS[row["kind"]]], ms=6 if row is rows[0] else 3.5, elinewidth=0.5, alpha=0.8,
                      label=row["variant"])
    if chance is not None:
        axes.axvline(chance, color="black", ls=":", lw=1)
    axes.set_yticks(range(len(leaves)), [leaf.removeprefix(common) for leaf in leaves], fontsize=6.5)
    axes.set_ylim(-0.8, len(leaves) - 0.2)
    axes.grid(axis="y", lw=0.3)
    axes.set_xlabel(f"{metric.split(',')[0]} (95 % interval; dotted: chance)")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    axes.set_title(group)
    figure.tight_layout()
    return figure


def layer_skips(rows: list[dict], always_keep: int = 4, title: str = ""):
    """Share of scored tokens that skip each routable unit, one line a variant that skips any."""
    table = {row["variant"]: [1 - rate for rate in row["keep_rate"]] for row in rows if row["keep_rate"]}
    if not table:
        return None
    rates, first = pd.DataFrame(table.values(), index=list(table)), next(row for row in rows if row["keep_rate"])
    rates.columns = unit_names(rates.shape[1], first.get("always_keep", always_keep), 1 + (first.get("unit") == "sublayer"))
    return heat(rates, "skip rate", title)


def redraw(folder):
    """Bar, scatter, per-task and per-layer figures of every finished run that compares variants; returns their paths."""
    from dlr.figures import save
    from dlr.runs import finished_runs
    made = []
    for name, run in finished_runs("evaluation").items():
        rows = run["metrics"]["rows"]
        if len(rows) < 2:
            continue
        made += [save(draw(rows, title=f"Benchmarks: {name}"), folder, f"evaluation_{name}_{label}")
                 for label, draw in (("bars", bars), ("scatter", scatter))]
        made += [save(group_tasks(rows, run["metrics"]["harness"], group), folder, f"evaluation_{name}_{group}")
                 for group in groups(rows)]
        skips = layer_skips(rows, title=f"Layers skipped: {name}")
        if skips is not None:
            made.append(save(skips, folder, f"evaluation_{name}_layers"))
    return made
