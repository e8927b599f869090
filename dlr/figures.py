"""Figures, drawn from results alone (metrics.json rows and log.csv); each is saved as PNG and PDF.

    python -m dlr.figures        # redraws figures/ from results/
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dlr.runs import finished_runs, project_root

# Okabe-Ito: told apart without red-green vision.
COLOURS = {"DLR": "#0072B2", "best static": "#D55E00", "mean plan": "#E69F00", "shuffled": "#009E73",
           "random plan": "#999999", "stochastic depth": "#CC79A7", "dense LoRA": "#000000", "base": "#666666"}


def style() -> None:
    """The look shared by all figures."""
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    matplotlib.rcParams |= {"figure.dpi": 110, "savefig.dpi": 200, "axes.spines.top": False,
                            "axes.spines.right": False, "pdf.fonttype": 42}


def save(figure, folder: Path, name: str) -> Path:
    """Writes name.png and name.pdf; returns the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        metadata = {"CreationDate": None} if suffix == "pdf" else {}
        figure.savefig(folder / f"{name}.{suffix}", bbox_inches="tight", metadata=metadata)
    return folder / f"{name}.png"


# The kinds of rows that `study` makes, by what figures call them.
KINDS = {"routed": "DLR", "static": "best static", "mean": "mean plan", "shuffled": "shuffled", "random": "random plan",
         "stochastic": "stochastic depth", "dense": "dense LoRA", "base": "base"}


def kind_of(row: dict) -> str:
    """The kind of a results row, one of KINDS; rows from before they said it had one of a few fixed names."""
    if isinstance(row.get("kind"), str):
        return row["kind"]
    name = row["variant"]
    for kind, words in KINDS.items():
        if name == words or name.endswith(f", {words}") or (kind == "stochastic" and name.startswith(words)):
            return kind
    return "routed"


def unit_names(count: int, always_keep: int, units_per_layer: int = 1) -> list[str]:
    """What the gates of `count` units decide on: the model's layer numbers, with the part where layers have two."""
    parts = ("",) if units_per_layer == 1 else (" attention", " MLP")
    return [f"{always_keep + unit // units_per_layer}{parts[unit % units_per_layer]}" for unit in range(count)]


def heat(rates: pd.DataFrame, label: str, title: str = ""):
    """Rates between 0 and 1 as coloured cells: a row a variant, a column a routable unit, named as in `unit_names`."""
    style()
    figure, axes = plt.subplots(figsize=(0.45 * rates.shape[1] + 2.5, 0.36 * len(rates) + 1.3))
    sns.heatmap(rates, vmin=0, vmax=1, cmap="cividis", ax=axes, annot=True, fmt=".2f", annot_kws={"size": 6},
                cbar_kws={"label": label}, xticklabels=True)
    axes.set(xlabel="layer", ylabel="", title=title)
    figure.tight_layout()
    return figure


def comparison(table: pd.DataFrame, title: str = ""):
    """Perplexity with 95 % intervals beside measured skip, one row a variant."""
    style()
    rows = table.iloc[::-1].reset_index(drop=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.36 * len(rows) + 1.2), sharey=True,
                                         gridspec_kw={"width_ratios": [3, 2]})
    places = np.arange(len(rows))
    colours = [COLOURS[KINDS[kind_of(row)]] for row in rows.to_dict("records")]
    for place, row, colour in zip(places, rows.itertuples(), colours):
        left.errorbar(row.perplexity, place, xerr=[[row.perplexity - row.perplexity_low],
                                                   [row.perplexity_high - row.perplexity]], fmt="o",
                      color=colour, capsize=3)
        right.barh(place, 100 * row.skip, color=colour)
        right.text(100 * row.skip + 1, place, f"{100 * row.skip:.1f}", va="center", fontsize=8)
    left.set_yticks(places, rows["variant"])
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.set_xlabel("test perplexity (95 % interval over documents)")
    if rows["perplexity"].max() > 4 * rows["perplexity"].min():
        left.set_xscale("log")
        left.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        left.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        left.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    right.set_xlabel("measured skip (%)")
    right.set_xlim(0, max(70, 100 * rows["skip"].max() + 12))
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def verdicts(runs: dict[str, dict]) -> pd.DataFrame:
    """Each finished run's paired difference between the router and the best static plan, with its measured skip."""
    return pd.DataFrame([{"run": name, "skip": run["metrics"]["rows"][0]["skip"], **run["metrics"]["against_static"]}
                         for name, run in runs.items() if run["metrics"].get("against_static")])


def frontier(table: pd.DataFrame, differences: pd.DataFrame, title: str = ""):
    """Perplexity against measured skip (mean over seeds, one SD), and below it the router against the best static plan.

    `differences` comes from `verdicts`; each point is one run with its paired 95 % interval over documents.
    """
    style()
    figure, (axes, lower) = plt.subplots(2, 1, figsize=(6.4, 6.2), sharex=True, height_ratios=[5, 2])
    if len(differences):
        shift = differences.groupby(differences["skip"].round(1)).cumcount() * 0.8
        lower.errorbar(100 * differences["skip"] + shift, differences["nll_difference"],
                       yerr=[differences["nll_difference"] - differences["low"],
                             differences["high"] - differences["nll_difference"]], fmt="o", ms=4, capsize=2,
                       color=COLOURS["DLR"])
    lower.axhline(0, color=COLOURS["best static"], lw=1)
    lower.set_xlabel("measured skip on the test split (%)")
    lower.set_ylabel("DLR - best static\n(nats a token)")
    data = table.copy()
    data["kind"] = [kind_of(row) for row in table.to_dict("records")]
    data["budget"] = data["skip"].round(1)
    for kind, group in data.groupby("kind", sort=False):
        name = KINDS[kind]
        points = group.groupby("budget").agg(skip=("skip", "mean"), mean=("perplexity", "mean"),
                                             spread=("perplexity", "std")).fillna(0.0)
        axes.errorbar(100 * points["skip"], points["mean"], yerr=points["spread"], label=name,
                      color=COLOURS[name], marker="o", capsize=3, lw=2 if kind in ("routed", "static") else 1,
                      ls="-" if len(points) > 1 else "none")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_ylabel("test perplexity")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def keep_rates(table: pd.DataFrame, always_keep: int = 4, title: str = ""):
    """Share of tokens that run each routable unit, one row a variant; None without rows.

    Rows that say their layers and units are believed.
    """
    if table.empty:
        return None
    first = table.iloc[0].to_dict()
    rates = pd.DataFrame(table["keep_rate"].tolist(), index=table["variant"])
    rates.columns = unit_names(rates.shape[1], int(first.get("always_keep", always_keep)),
                               1 + (first.get("unit") == "sublayer"))
    return heat(rates, "keep rate", title)


def training(logs: dict[str, pd.DataFrame], title: str = ""):
    """Cross-entropy and skip over the steps of each variant, with the budget asked for; None without logs."""
    style()
    if not logs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    palette = dict(zip(logs, sns.color_palette("colorblind", len(logs))))
    for name, log in logs.items():
        left.plot(log["step"], log["ce"].rolling(5, min_periods=1).mean(), label=name, color=palette[name])
        right.plot(log["step"], 100 * log["skip"], color=palette[name])
    goal = next(iter(logs.values()))["goal"].iloc[-1]
    right.axhline(100 * goal, color="black", lw=0.8, ls=":")
    right.text(0, 100 * goal + 1, "target", fontsize=8)
    left.set_xlabel("step")
    left.set_ylabel("training cross-entropy (nats)")
    right.set_xlabel("step")
    right.set_ylabel("skip in training (%)")
    right.set_ylim(-2, 102)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def layer_harm(harm: list[float], title: str = ""):
    """Loss added by skipping each single layer."""
    style()
    figure, axes = plt.subplots(figsize=(6, 2.6))
    axes.bar(range(len(harm)), harm, color=COLOURS["DLR"])
    axes.set_xlabel("layer skipped")
    axes.set_ylabel("loss added (nats a token)")
    if max(harm) > 20 * max(sorted(harm)[len(harm) // 2], 1e-6):
        axes.set_yscale("log")
    axes.set_title(title)
    figure.tight_layout()
    return figure


def pretraining(history: pd.DataFrame):
    """Training loss by tokens seen, stage by stage."""
    style()
    figure, axes = plt.subplots(figsize=(6, 3))
    for (stage, group), colour in zip(history.groupby("stage", sort=False), (COLOURS["DLR"], COLOURS["best static"])):
        axes.plot(group["tokens"] / 1e6, group["loss"], label=stage, color=colour)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


@matplotlib.rc_context({"figure.max_open_warning": 0})       # closed together, below
def redraw() -> list[Path]:
    """figures/ from results/, for the phases that have results."""
    folder, made = project_root() / "figures", []
    pareto = finished_runs("pareto")
    if pareto:
        rows = pd.DataFrame([r for run in pareto.values() for r in run["metrics"]["rows"]])
        made.append(save(frontier(rows, verdicts(pareto), "Embedded model"), folder, "pareto"))
    for phase, title in (("token_routing", "Token-level routing"), ("baselines", "Baselines"),
                         ("sequence_routing", "Sequence-level routing")):
        for name, run in finished_runs(phase).items():
            if name == "default":
                rows = pd.DataFrame(run["metrics"]["rows"])
                made.append(save(comparison(rows, title), folder, phase))
                made.append(save(keep_rates(rows, title=title), folder, f"{phase}_keep_rates"))
    for run in finished_runs("base_model").values():
        if "layer_harm" in run["metrics"]:
            made.append(save(layer_harm(run["metrics"]["layer_harm"], "Base model"), folder, "base_model_layers"))
    from dlr.figures_analysis import redraw_all
    made += redraw_all(folder)
    from dlr import figures_evaluation
    made += figures_evaluation.redraw(folder)
    from dlr import figures_latency
    for name, run in finished_runs("latency").items():
        rows = pd.DataFrame(run["metrics"]["rows"])
        title = f"{rows['model'].iloc[0]}, {rows['layers'].iloc[0]} layers, {rows['dtype'].iloc[0]}, " \
                f"{run['run']['hardware']['accelerator'] or run['run']['hardware']['processor']}"
        made.append(save(figures_latency.speedups(rows, title=title), folder, f"latency_{name}"))
    plt.close("all")
    return made


if __name__ == "__main__":
    for path in redraw():
        print(path)
