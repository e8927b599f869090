"""Which figures there are: a function that returns a matplotlib figure registers itself.

    @figure("latency", lambda runs: {f"mine_{name}": (run.rows,) for name, run in runs.items()})
    @drawn
    def mine(rows):
        picture, axes = plt.subplots()
        axes.plot([row["skip"] for row in rows], [row["speedup"] for row in rows])
        return picture

Every module beside this one, named as it is, is imported; `python -m dlr.figures` draws them all.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt

from dlr.runs import Run, finished_runs, project_root, results_folder, save_figure


class Figure(NamedTuple):
    """A function that draws, and what it is to draw of a phase's runs."""
    draw: Callable
    phase: str
    files: Callable[[dict[str, Run]], dict[str, tuple]]
    run: str | None


FIGURES: list[Figure] = []


def figure(phase: str, files: Callable[[dict[str, Run]], dict[str, tuple]], run: str | None = None):
    """Registers a function for `python -m dlr.figures`.

    Args:
        files: maps the phase's finished runs, at least one, to the function's arguments by file.
        run: the one run that figures/ shows. None: each, which `files` gives names of their own.
    """
    def register(function):
        FIGURES.append(Figure(function, phase, files, run))
        return function
    return register


def registered() -> list[Figure]:
    """Every figure, of every module that lies beside this one and is named as it is."""
    beside = __name__.removesuffix("register")
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], __package__ + "."):
        if module.name.startswith(beside):
            importlib.import_module(module.name)
    return FIGURES


@matplotlib.rc_context({"figure.max_open_warning": 0})       # they are closed together, below
def redraw(run: Path | None = None, folder: Path | None = None) -> list[Path]:
    """Draws every registered figure; a file for which there is nothing to draw is left out.

    Args:
        run: one finished run's folder, whose figures are drawn. None: those of results/.
        folder: where they go, instead of figures/, or of the run's own folder.

    Raises:
        FileNotFoundError: that run is not finished.
    """
    if run is not None and not Run(run).done:
        raise FileNotFoundError(f"{str(run)!r} has no metrics.json, so that run is not finished; "
                                f"give it again: python -m dlr run {run.absolute().parent.name}")
    pictures = {}
    for entry in registered():
        if run is None:
            runs = {name: Run(results_folder() / entry.phase / name)
                    for name in finished_runs(entry.phase) if entry.run in (None, name)}
        else:
            runs = {run.name: Run(run)} if run.absolute().parent.name == entry.phase else {}
        for name, arguments in (entry.files(runs) if runs else {}).items():
            shown = name if run is None else name.removeprefix(f"{entry.phase}_")
            pictures[shown] = entry.draw(*arguments)
    target = folder or run or project_root() / "figures"
    paths = [save_figure(picture, target, name) for name, picture in pictures.items() if picture]
    plt.close("all")
    return paths
