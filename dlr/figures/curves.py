"""Figures of training, step by step, from each run's log.csv: losses, temperature, depth."""

import itertools
import re

import matplotlib.pyplot as plt
import pandas as pd

from dlr.figures.register import figure
from dlr.figures.style import COLOURS, DOUBLE, drawn, legend
from dlr.figures.training import group_names
from dlr.runs import Run, alike

PHASES = {"baselines": "Baselines", "sequence_routing": "Sequence-level routing",
          "token_routing": "Token-level routing", "pareto": "Frontier"}
LOSSES = {"ce": ("cross-entropy", COLOURS["routed"]), "kd": ("distillation", COLOURS["mean"]),
          "budget": ("budget term", COLOURS["static"])}
SPAN = 10                         # steps of the exponentially weighted mean of a training loss
NAMES = {"router": "DLR", "static": "best static", "dense": "dense LoRA",
         "stochastic": "stochastic depth"}
KNOWN = {"DLR": "routed", "best static": "static", "dense LoRA": "dense",
         "stochastic depth": "stochastic"}
OTHERS = "#56B4E9", "#009E73", "#E69F00", "#999999", "#882255", "#117733"


def variants(run: Run) -> dict[str, pd.DataFrame]:
    """The log of each variant that a run trained, by the variant's folder, as people call it."""
    return {NAMES.get(path.parent.name, path.parent.name.replace("lambda-", "\u03bb = "))
            .replace("-", " "): pd.read_csv(path)
            for path in sorted(run.folder.glob("*/log.csv"))}


def lines_of(group: dict[str, Run], column: str) -> dict[str, dict[str, pd.Series]]:
    """Column by step of every variant that has it, a panel a phase; the mean over seeds.

    A phase's default run stands for it, where that has the column.

    Args:
        group: runs by phase/name.
    """
    panels: dict[str, dict[tuple[str, str], list]] = {}
    for name, run in group.items():
        phase, _, its = name.partition("/")
        its = re.sub(r"[,-]?seed=\d+|[,-]?(router|baselines)$", "", its)
        for variant, log in variants(run).items():
            if column in log and log[column].notna().any():
                series = log.set_index("step")[column].dropna()
                lines = panels.setdefault(PHASES[phase], {})
                lines.setdefault((variant, its), []).append(series)
    named = {}
    for phase, lines in panels.items():
        default = {key: several for key, several in lines.items() if key[1] == "default"}
        lines = default or lines
        one = len({its for _, its in lines}) == 1
        named[phase] = {variant if one else f"{variant}, {its}":
                        pd.concat(several, axis=1).mean(axis=1)
                        for (variant, its), several in lines.items()}
    return named


def convergence_files(stem: str, column: str):
    """Maps runs to the arguments of `_convergence`, a file for runs that are `alike`."""
    def files(runs: dict[str, Run]) -> dict[str, tuple]:
        named = {}
        for key, group in alike(runs).items():
            if panels := lines_of(group, column):
                file, title = group_names(stem, key)
                named[file] = panels, title
        return named
    return files


def _convergence(panels: dict[str, dict[str, pd.Series]], title: str, label: str):
    picture, grid = plt.subplots(1, len(panels), figsize=(DOUBLE, 3.3), sharey=True, squeeze=False)
    for axes, (phase, lines) in zip(grid[0], panels.items()):
        others = itertools.cycle(zip(OTHERS, ("--", ":", "-.") * 2))
        for name, line in lines.items():
            look = (COLOURS[KNOWN[name]], "-") if name in KNOWN else next(others)
            axes.plot(line.index, line, label=name, color=look[0], ls=look[1])
        axes.set(xlabel="step", title=phase)
        # Below its own panel, since each has its own lines.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=1 + (len(lines) > 4),
                    fontsize=6.5, handlelength=2.8)     # a whole period of '-.'
    grid[0, 0].set_ylabel(label)
    picture.suptitle(title)
    return picture


@figure(tuple(PHASES), convergence_files("validation_loss", "val_ce"), reads=("*/log.csv",),
        command="python -m dlr run baselines sequence_routing token_routing --set eval_steps=5",
        replaces=("validation_loss_convergence", "all_experiments_val_loss"))
@drawn
def validation_loss(panels: dict[str, dict[str, pd.Series]], title: str = ""):
    """Held-out loss in training of every method, a panel a phase.

    Args:
        panels: loss by step, in nats a token, by phase and variant; a mean over seeds.
    """
    return _convergence(panels, title, "held-out cross-entropy\n(nats a token)")


@figure(tuple(PHASES), convergence_files("training_loss", "ce"), reads=("*/log.csv",),
        command="python -m dlr run baselines sequence_routing token_routing",
        replaces=("training_loss_trajectory", "training_loss_final_bar"))
@drawn
def training_loss(panels: dict[str, dict[str, pd.Series]], title: str = ""):
    """Training loss of every method, an exponentially weighted mean, a panel a phase.

    Args:
        panels: loss by step, in nats a token, by phase and variant; a mean over seeds.
    """
    smooth = {phase: {name: line.ewm(span=SPAN).mean() for name, line in lines.items()}
              for phase, lines in panels.items()}
    return _convergence(smooth, title, f"training cross-entropy (nats a token)\n"
                                       f"weighted mean, span {SPAN} steps")


def _panels(count: int, height: float = 1.6):
    """A grid of `count` panels, up to four in a row, and the panels."""
    lines = -(-count // 4)
    columns = -(-count // lines)
    picture, grid = plt.subplots(lines, columns, squeeze=False, sharex=True,
                                 figsize=(DOUBLE, 0.8 + height * lines))
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, count - columns):count]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    return picture, grid.flat[:count]


def _routed(phase: str, stem: str, replaces: str):
    """Registers a figure of a default run's logs of variants under a budget term."""
    def files(runs):
        logs = {name: log for run in runs.values() for name, log in variants(run).items()
                if log["skip"].any()}
        kept = [row["always_keep"] for run in runs.values() for row in run.rows
                if "always_keep" in row] or [4]
        return {f"{stem}_{phase}": (logs, PHASES[phase], kept[0])} if logs else {}
    return figure(phase, files, "default", reads=("metrics.json", "*/log.csv"),
                  replaces=(replaces,))


@_routed("sequence_routing", "loss_breakdown", "exp6_loss_breakdown")
@_routed("token_routing", "loss_breakdown", "exp10_loss_breakdown")
@drawn
def loss_breakdown(logs: dict[str, pd.DataFrame], title: str = "", always_keep: int = 4):
    """Cross-entropy, distillation and budget term over the steps, a panel a variant."""
    picture, panels = _panels(len(logs))
    for axes, (name, log) in zip(panels, logs.items()):
        for column, (label, colour) in LOSSES.items():
            if log[column].any():
                axes.plot(log["step"], log[column].ewm(span=SPAN).mean(), color=colour, label=label)
        if log["budget"].max() > 10:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.08 * log[list(LOSSES)].max(axis=None))
        axes.set_title(name)
    panels[0].set_ylabel("nats a token")
    legend(picture)
    picture.suptitle(title)
    return picture


@_routed("sequence_routing", "temperature", "exp6_temp_annealing")
@_routed("token_routing", "temperature", "exp10_temp_annealing")
@drawn
def temperature(logs: dict[str, pd.DataFrame], title: str = "", always_keep: int = 4):
    """Gumbel temperature and active layers over the steps, a panel a variant.

    Args:
        logs: with columns step, skip, temperature (empty where gates have no noise), keep_0 ...
        always_keep: layers that every token runs, beside the units of the log.
    """
    picture, panels = _panels(len(logs))
    for axes, (name, log) in zip(panels, logs.items()):
        units = len(log.filter(regex=r"^keep_\d+$").columns)
        axes.plot(log["step"], always_keep + units * (1 - log["skip"]), color=COLOURS["routed"],
                  label="active layers (left)")
        axes.set(title=name, ylim=(0, always_keep + units + 0.5))
        if log["temperature"].notna().any():
            beside = axes.twinx()
            beside.spines["right"].set_visible(True)
            beside.plot(log["step"], log["temperature"], "--", color=COLOURS["static"],
                        label="temperature (right)")
            beside.set_ylim(0, 1.08 * log["temperature"].max())
    panels[0].set_ylabel("active layers")
    legend(picture)
    picture.suptitle(title)
    return picture
