"""Sweeps: a grid of settings, run point by point. What is finished with these settings and data is not run again."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from dlr.identity import resolved, said
from dlr.places import Wanted, schema_of
from dlr.progress import tqdm
from dlr.runs import Run, finished_runs, project_root, results_folder, slug, write_atomically
from dlr.settings import SettingsError, checked_name, effective, read_params
from dlr.workbook import effective_of, results_table, seeds_table


def expand(sweep: dict) -> list[tuple[str, dict]]:
    """(run name, parameters) of every point of a sweep file; no two points share a name.

    A sweep file holds `phase`, optional `common` settings, and `grid`: mappings whose lists are multiplied out. Lists
    of a setting that is itself a list are written as lists of lists.

    Raises:
        SettingsError: the file is none of a sweep, or a point no notebook takes.
    """
    unknown = sorted(sweep.keys() - {"phase", "common", "grid"})
    if unknown or "phase" not in sweep or "grid" not in sweep:
        raise SettingsError("a sweep file holds phase, grid and, if you like, common"
                            + (f"; unknown: {', '.join(unknown)}" if unknown else ""))
    schema, common = schema_of(str(sweep["phase"])), sweep.get("common") or {}
    grid = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    if not isinstance(common, dict) or not grid or not all(isinstance(axes, dict) and axes for axes in grid):
        raise SettingsError("common is a mapping of settings, and grid one (or a list of them) of lists to multiply out")
    points = []
    for axes in grid:
        lists = {name: value if isinstance(value, list) else [value] for name, value in axes.items()}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values))
            parameters = {**common, **chosen}
            effective(parameters, schema)
            if (chosen, parameters) not in points:
                points.append((chosen, parameters))
    names = [_point_name(chosen).casefold() for chosen, _ in points]         # model: [a/b, a-b] would share a folder
    return [(name, parameters | {"run_name": name}) for chosen, parameters in points
            for name in [_point_name(chosen, told_apart=names.count(_point_name(chosen).casefold()) > 1)]]


def _point_name(chosen: dict, told_apart: bool = False) -> str:
    """A point's settings as a folder's name: 'router-target_skip=0.2-seed=0', with a hash where that is not unique."""
    name = slug("-".join(f"{k}={v}" if not isinstance(v, str) else v for k, v in chosen.items()))
    if told_apart or len(name.encode()) > 120:
        name = f"{name[:60]}-{hashlib.sha256(repr(sorted(chosen.items())).encode()).hexdigest()[:6]}"
    return name


def _standing(phase: str, points: list, force: bool) -> list[tuple[str, dict]]:
    """The points that are still to run.

    Raises:
        SettingsError: some are there under other settings or data, and `force` does not replace them.
    """
    waiting, other = [], {}
    for name, parameters in points:
        run, wanted = Run(results_folder() / phase / name), Wanted(phase, effective_of(phase, parameters))
        found = wanted.differences(run) if run.exists and not force else {}
        if found:
            other[name] = found
        if force or not run.done or found:
            waiting.append((name, parameters))
    if other:
        raise SettingsError(
            f"{len(points)} runs, {len(other)} hold other settings or data ({said(next(iter(other.values())))}): "
            f"{', '.join(list(other)[:4])}{' ...' if len(other) > 4 else ''}. Nothing was run. --name NAME puts this "
            "sweep beside them, --force replaces them.")
    return waiting


def run_sweep(path: str | Path, jobs: int = 1, prefix: str = "", force: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Runs what a sweep file asks for and is not there yet, `jobs` at a time; returns the table and the failed runs.

    Args:
        prefix: begins the names of this sweep's runs, so that it stands beside another one.
        force: run all of it again, in place of what is there.
    """
    sweep = read_params(path)
    phase, points = str(sweep.get("phase")), expand(sweep)
    if prefix:
        points = [(f"{checked_name(prefix)}-{name}", parameters) for name, parameters in points]
    points = [(name, resolved(parameters, schema_of(phase)) | {"run_name": name}) for name, parameters in points]
    waiting, root = _standing(phase, points, force), results_folder() / phase
    print(f"{len(points)} runs, {len(points) - len(waiting)} finished already, {jobs} at a time", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DLR_TERMINAL": "1"}
    running: dict = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(waiting), desc="sweep", unit="run") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, parameters = waiting.pop(0)
                (root / name).mkdir(parents=True, exist_ok=True)
                file = Path(scratch) / f"{name}.yaml"
                file.write_text(json.dumps(parameters), encoding="utf-8")
                output = (root / name / "output.txt").open("w", encoding="utf-8")
                command = [sys.executable, "-m", "dlr", "run", phase, "--params", str(file), "--name", name]
                running[subprocess.Popen(command + ["--force"] * force, stdout=output, stderr=subprocess.STDOUT,
                                         env=environment, cwd=project_root())] = (name, output)
                if waiting and len(running) < jobs:
                    time.sleep(3)              # kernels that start together race for ports
            for process in [p for p in running if p.poll() is not None]:
                name, output = running.pop(process)
                output.close()
                bar.update()
                if process.returncode:
                    failed.append(name)
                    bar.write(f"{name} failed; see {root / name / 'output.txt'}")
            time.sleep(0.2)
    return results_table(phase, names=[name for name, _ in points]), failed


def write_table(path: str | Path, table: pd.DataFrame, prefix: str = "") -> tuple[str, Path]:
    """A sweep's means over seeds as markdown, and the file that keeps them.

    That is table.md of the phase while this sweep's runs are all there are; beside others it gets a name of its own.
    """
    phase = str(read_params(path)["phase"])
    text = seeds_table(table).to_markdown(index=False)
    alone = finished_runs(phase).keys() <= set(table["run"])
    file = results_folder() / phase / ("table.md" if alone else f"table-{prefix or slug(Path(path).stem)}.md")
    write_atomically(file, text + "\n")
    return text, file
