"""Which figures there are: a function that returns a matplotlib figure registers itself.

    @figure("latency", lambda runs: {f"mine_{name}": (run.rows,) for name, run in runs.items()})
    @drawn
    def mine(rows):
        picture, axes = plt.subplots()
        axes.plot([row["skip"] for row in rows], [row["speedup"] for row in rows])
        return picture

Every module beside this one, named as it is, is imported; `python -m dlr.figures` draws them all.
What others read of it: `registered()`, name to `Figure`, and `Figure.files_of()`, the files that a
figure is drawn into, each with the arguments of `Figure.draw`; none where its data is missing.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt

from dlr.progress import tqdm
from dlr.runs import Run, finished_runs, project_root, results_folder, save_figure, slug

# The plotted figures of the first studies, by their files' names.
ORIGINALS = ("validation_loss_convergence", "validation_loss_final_bar",
             "training_loss_trajectory", "training_loss_final_bar", "inference_speedup_bar",
             "phase_transition_comparison", "pareto_frontier_curve", "pareto_dual_axis",
             "pareto_sweep_bar", "exp6_loss_breakdown", "exp6_temp_annealing",
             "all_experiments_val_loss", "exp10_loss_breakdown", "exp10_temp_annealing",
             "exp7_benchmark_accuracy", "exp7_perplexity_bar", "exp7_efficiency_scatter")


class Figure(NamedTuple):
    """A function that draws, and what it is to draw of the runs of one or more phases.

    Attributes:
        name: what `--only` takes; the phase and the function.
        title: what the figure shows, a sentence.
        draw: the function; takes what `files` gives, returns a matplotlib figure or None.
        phases: whose finished runs it reads.
        files: maps the runs to the function's arguments by file name; empty: data is missing.
        run: the one run that is read of each phase; None: each.
        reads: the files of a run that it reads.
        command: makes its data.
        replaces: those of ORIGINALS that it stands for.
    """
    name: str
    title: str
    draw: Callable
    phases: tuple[str, ...]
    files: Callable[[dict[str, Run]], dict[str, tuple]]
    run: str | None
    reads: tuple[str, ...]
    command: str
    replaces: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The files below results/ that it reads, as patterns."""
        return tuple(f"{phase}/{self.run or '*'}/{file}"
                     for phase in self.phases for file in self.reads)

    def runs_of(self, results: Path | None = None) -> dict[str, Run]:
        """Finished runs by name; by phase/name where it reads several phases."""
        root = results or results_folder()
        return {name if len(self.phases) == 1 else f"{phase}/{name}": Run(root / phase / name)
                for phase in self.phases for name in finished_runs(phase, root)
                if self.run in (None, name)}

    def files_of(self, results: Path | None = None) -> dict[str, tuple]:
        """Arguments of `draw` by file name, from a folder of results (its place by default)."""
        runs = self.runs_of(results)
        return self.files(runs) if runs else {}


FIGURES: dict[str, Figure] = {}


def figure(phase: str | tuple[str, ...], files: Callable[[dict[str, Run]], dict[str, tuple]],
           run: str | None = None, *, reads: Iterable[str] = ("metrics.json",), command: str = "",
           replaces: Iterable[str] = ()):
    """Registers a function for `python -m dlr.figures`.

    Args:
        phase: whose runs it draws; several where they stand in one picture.
        files: maps the finished runs, at least one, to the function's arguments by file name.
        run: the one run that figures/ shows. None: each, which `files` gives names of their own.
        reads: files of a run that it reads.
        command: makes its data; by default the phase's run.
        replaces: figures of the first studies that it stands for, of ORIGINALS.
    """
    phases = (phase,) if isinstance(phase, str) else tuple(phase)

    def register(function):
        named = function.__name__ if len(phases) > 1 else f"{phases[0]}_{function.__name__}"
        title = (inspect.getdoc(function) or named).split("\n")[0]
        FIGURES[named] = Figure(named, title, function, phases, files, run, tuple(reads),
                                command or f"python -m dlr run {' '.join(phases)}",
                                tuple(replaces))
        return function
    return register


def registered() -> dict[str, Figure]:
    """Every figure by name, of every module that lies beside this one and is named as it is."""
    beside = __name__.removesuffix("register")
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], __package__ + "."):
        if module.name.startswith(beside):
            importlib.import_module(module.name)
    return FIGURES


def chosen(only: str | None) -> list[Figure]:
    """All figures, or the one of that name.

    Raises:
        ValueError: there is none of that name.
    """
    figures = registered()
    if only is not None and only not in figures:
        raise ValueError(f"There is no figure {only!r}; python -m dlr.figures --list names all "
                         f"{len(figures)}: {', '.join(sorted(figures))}.")
    return [figures[only]] if only else list(figures.values())


def missing(only: str | None = None, results: Path | None = None) -> list[Figure]:
    """The figures whose data is in no finished run of `results`; each says what makes it."""
    return [entry for entry in chosen(only) if not entry.files_of(results)]


def of_run(entry: Figure, run: Run) -> dict[str, tuple]:
    """Arguments by file name of one run's own figure, without the phase's name in front."""
    phase = run.folder.absolute().parent.name
    if phase not in entry.phases:
        return {}
    name = run.folder.name if len(entry.phases) == 1 else f"{phase}/{run.folder.name}"
    return {file.removeprefix(f"{phase}_"): arguments
            for file, arguments in entry.files({name: run}).items()}


@matplotlib.rc_context({"figure.max_open_warning": 0})       # a caller may hold many of its own
def redraw(run: Path | None = None, folder: Path | None = None, *, only: str | None = None,
           results: Path | None = None) -> list[Path]:
    """Draws registered figures; a file for which there is nothing to draw is left out.

    Args:
        run: one finished run's folder, whose figures are drawn. None: those of results/.
        folder: where they go, instead of figures/, or of the run's own folder.
        only: the name of the one figure to draw. None: all.
        results: where the runs are, instead of results/.

    Returns the PNG's path of each.

    Raises:
        FileNotFoundError: that run is not finished.
        ValueError: there is no figure of that name.
    """
    if run is not None and not Run(run).done:
        raise FileNotFoundError(f"{str(run)!r} has no metrics.json, so that run is not finished; "
                                f"give it again: python -m dlr run {run.absolute().parent.name}")
    target = folder or run or project_root() / "figures"
    before, paths = set(plt.get_fignums()), []
    for entry in tqdm(chosen(only), desc="drawing", unit="figure"):
        files = entry.files_of(results) if run is None else of_run(entry, Run(run))
        for name, arguments in files.items():
            picture = entry.draw(*arguments)
            if picture:
                paths.append(save_figure(picture, target, slug(name)))
                plt.close(picture)
    for number in set(plt.get_fignums()) - before:
        plt.close(number)
    return paths
