"""The figures of the report, drawn from results alone, as data that lies inside the page."""

import base64
import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt

from dlr.figures.register import registered
from dlr.runs import Run
from dlr.workbook.report.sources import Results

# The predecessor's figures: its file, what it shows, and the beginnings of the names of ours.
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


class Picture(NamedTuple):
    """A figure that can be drawn: its name, its phase, what it shows, and what draws it."""
    name: str
    phase: str
    caption: str
    draw: Callable


def _figures(results: Results) -> list[tuple]:
    """(phase, function, {file name: its arguments}) of every registered figure.

    This function and `replaced` are all that the report knows of the register of figures.
    """
    known = []
    for entry in registered():
        runs = {run.partition("/")[2]: Run(results.root / run) for run in results.runs(entry.phase)}
        runs = {name: run for name, run in runs.items() if entry.run in (None, name)}
        known.append((entry.phase, entry.draw, entry.files(runs) if runs else {}))
    return known


def pictures(results: Results, phase: str) -> list[Picture]:
    """The registered figures of a phase that these results can draw."""
    found = []
    for of, draw, files in _figures(results):
        caption = " ".join((draw.__doc__ or "").split("\n\n")[0].split())
        if of == phase:
            found += [Picture(name, phase, caption, partial(draw, *own))
                      for name, own in files.items()]
    return found


def replaced(names: list[str]) -> list[tuple[str, str, list[str]]]:
    """(the predecessor's figure, what it shows, ours among `names`), for each of its figures."""
    return [(file, shows, [name for name in names if name.startswith(tuple(beginnings))])
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


def data_uri(content: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
