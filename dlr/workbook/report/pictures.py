"""The figures of the report, drawn from results alone, as data that lies inside the page."""

import base64
import io
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import matplotlib.pyplot as plt

from dlr.figures.register import registered
from dlr.runs import Run
from dlr.workbook.report.sources import Results

# The predecessor's figures: its file, what it shows, and the beginnings of the names of ours that
# stand for it where the register does not say so.
ORIGINAL = [
    ("validation_loss_convergence", "validation loss by step", ["validation"]),
    ("validation_loss_final_bar", "last validation loss", ["baselines", "token_routing"]),
    ("training_loss_trajectory", "training loss by step", ["training_loss"]),
    ("training_loss_final_bar", "last training loss", ["training_loss"]),
    ("inference_speedup_bar", "tokens a second by layers", ["latency"]),
    ("phase_transition_comparison", "active layers by λ, two models", ["phase_transition"]),
    ("pareto_frontier_curve", "loss by active layers", ["pareto"]),
    ("pareto_dual_axis", "layers and loss by λ", ["penalty"]),
    ("pareto_sweep_bar", "loss by λ", ["penalty"]),
    ("exp6_loss_breakdown", "parts of the loss, sequence router", ["loss_breakdown"]),
    ("exp6_temp_annealing", "temperature and layers, sequence router", ["temperature"]),
    ("all_experiments_val_loss", "validation loss of five methods", ["validation"]),
    ("exp10_loss_breakdown", "parts of the loss, token router", ["loss_breakdown"]),
    ("exp10_temp_annealing", "temperature and layers, token router", ["temperature"]),
    ("exp7_benchmark_accuracy", "accuracy by variant and task", ["evaluation"]),
    ("exp7_perplexity_bar", "perplexity by variant", ["baselines", "token_routing"]),
    ("exp7_efficiency_scatter", "accuracy by active layers", ["evaluation"])]


class Registered(NamedTuple):
    """What the report knows of a registered figure.

    Attributes:
        phase: the first whose runs it reads. files: file name to the arguments of `draw`; none
            where its data is missing. command: makes its data. replaces: the predecessor's figures
            that it stands for; None where the register does not say.
    """
    phase: str
    draw: Callable
    files: dict[str, tuple]
    command: str
    replaces: tuple[str, ...] | None


@lru_cache(maxsize=4)
def figures_of(results: Results) -> list[Registered]:
    """Every registered figure. Nothing else in the report reads the register of figures."""
    known, entries = [], registered()
    if isinstance(entries, dict):                # a register that knows sources, by name
        return [Registered(entry.phases[0], entry.draw, entry.files_of(results.root),
                           entry.command, entry.replaces) for entry in entries.values()]
    for entry in entries:
        runs = {run.partition("/")[2]: Run(results.root / run) for run in results.runs(entry.phase)}
        runs = {name: run for name, run in runs.items() if entry.run in (None, name)}
        known.append(Registered(entry.phase, entry.draw, entry.files(runs) if runs else {},
                                f"python -m dlr run {entry.phase}", None))
    return known


class Picture(NamedTuple):
    """A figure that can be drawn: its name, what it shows, what draws it, what it stands for."""
    name: str
    caption: str
    draw: Callable
    replaces: tuple[str, ...] | None = None


def _caption(draw: Callable) -> str:
    return " ".join((draw.__doc__ or draw.__name__).split("\n\n")[0].split())


def pictures(results: Results, phase: str) -> list[Picture]:
    """The registered figures of a phase that these results can draw."""
    return [Picture(name, _caption(figure.draw), partial(figure.draw, *own), figure.replaces)
            for figure in figures_of(results) if figure.phase == phase
            for name, own in figure.files.items()]


def undrawn(results: Results) -> list[tuple[str, str]]:
    """(what it would show, command that makes its data) of each figure that is not drawn."""
    return [(_caption(figure.draw), figure.command) for figure in figures_of(results)
            if not figure.files]


def replaced(drawn: list[Picture]) -> list[tuple[str, str, list[str]]]:
    """(the predecessor's figure, what it shows, the names of ours), for each of its figures."""
    return [(file, shows, [picture.name for picture in drawn
                           if (picture.name.startswith(tuple(beginnings))
                               if picture.replaces is None else file in picture.replaces)])
            for file, shows, beginnings in ORIGINAL]


def png(picture: Picture) -> bytes | None:
    """A figure as a PNG file; None where there is nothing to draw."""
    drawn = picture.draw()
    if drawn is None:
        return None
    file = io.BytesIO()
    drawn.savefig(file, format="png", bbox_inches="tight", dpi=160)
    plt.close(drawn)
    return file.getvalue()


def is_tall(content: bytes) -> bool:
    """Whether a PNG file is so much higher than it is wide that it takes a page of its own."""
    width, height = (int.from_bytes(content[at:at + 4]) for at in (16, 20))
    return height > 1.25 * width


def data_uri(content: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
