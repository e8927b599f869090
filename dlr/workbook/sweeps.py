"""Sweeps: a grid of settings, run point by point; what is finished is not run again."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import pandas as pd
import torch

from dlr.base.identity import resolved, said
from dlr.progress import tqdm
from dlr.runs import Run, finished_runs, project_root, results_folder, slug, write_atomically
from dlr.settings import SettingsError, checked_name, effective, read_params
from dlr.workbook.phases import schema_of
from dlr.workbook.places import Wanted
from dlr.workbook.runner import checked_parameters, effective_of, seeds_table


def expand(sweep: dict) -> list[tuple[str, dict]]:
    """(run name, parameters) of every point of a sweep file; no two points share a name.

    A sweep file holds `phase`, optional `common` settings, and `grid`: mappings whose lists are
    multiplied out. Values of a setting that is itself a list are written as lists of lists.

    Raises:
        SettingsError: the file is none of a sweep, or a point no notebook takes.
    """
    unknown = sorted(sweep.keys() - {"phase", "common", "grid"})
    if unknown or "phase" not in sweep or "grid" not in sweep:
        raise SettingsError("a sweep file holds phase, grid and, if you like, common"
                            + (f"; unknown: {', '.join(unknown)}" if unknown else ""))
    schema, common = schema_of(str(sweep["phase"])), sweep.get("common") or {}
    grid = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    is_grid = grid and all(isinstance(axes, dict) and axes for axes in grid)
    if not is_grid or not isinstance(common, dict):
        raise SettingsError("common is a mapping of settings, and grid one (or a list of them) of "
                            "lists to multiply out")
    points = []
    for axes in grid:
        lists = {name: value if isinstance(value, list) else [value]
                 for name, value in axes.items()}
        points += [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    points = [point for place, point in enumerate(points) if point not in points[:place]]
    for point in points:
        effective(common | point, schema)
    names = [_point_name(point) for point in points]
    lower = [name.casefold() for name in names]       # model: [a/b, a-b] would share a folder
    names = [_hashed(name, point) if lower.count(name.casefold()) > 1 or len(name.encode()) > 120
             else name for name, point in zip(names, points)]
    return [(name, common | point | {"run_name": name}) for name, point in zip(names, points)]


def _point_name(point: dict) -> str:
    """A point's settings as a folder's name: 'router-target_skip=0.2-seed=0'."""
    return slug("-".join(value if isinstance(value, str) else f"{name}={value}"
                         for name, value in point.items()))


def _hashed(name: str, point: dict) -> str:
    """`name`, cut, with a hash of the point's settings."""
    return f"{name[:60]}-{hashlib.sha256(repr(sorted(point.items())).encode()).hexdigest()[:6]}"


def points_of(path: str | Path, prefix: str = "",
              assignments: list[str] = ()) -> tuple[str, list[tuple[str, dict]]]:
    """(phase, what `expand` gives) of a sweep file; files that settings name are found from here.

    Args:
        prefix: begins the names of this sweep's runs, so that it stands beside another one.
        assignments: `name=value` of settings that every point shares.
    """
    sweep = read_params(path)
    phase = str(sweep.get("phase"))
    if assignments:
        sweep["common"] = (sweep.get("common") or {}) | checked_parameters(phase, None, assignments)
    points = expand(sweep)
    if prefix:
        points = [(f"{checked_name(prefix)}-{name}", parameters) for name, parameters in points]
    return phase, [(name, resolved(parameters, schema_of(phase)) | {"run_name": name})
                   for name, parameters in points]


def unfinished(phase: str, points: list, force: bool) -> list[tuple[str, dict]]:
    """The points that are still to run.

    Raises:
        SettingsError: some hold other settings or data, and `force` does not replace them.
    """
    waiting = []
    other = {}
    for name, parameters in points:
        run = Run(results_folder() / phase / name)
        wanted = Wanted(phase, effective_of(phase, parameters))
        differences = wanted.differences(run) if run.exists and not force else {}
        if differences:
            other[name] = differences
        if force or not run.done:
            waiting.append((name, parameters))
    if other:
        raise SettingsError(
            f"{len(points)} runs, {len(other)} hold other settings or data "
            f"({said(next(iter(other.values())))}): {', '.join(list(other)[:4])}"
            f"{' ...' if len(other) > 4 else ''}. Nothing was run. --name NAME puts this sweep "
            "beside them, --force replaces them.")
    return waiting


def run_here(phase: str, points: list[tuple[str, dict]], jobs: int, force: bool) -> list[str]:
    """Runs points on this machine, `jobs` at a time; returns the names of those that failed."""
    failed = []
    slots = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot_environment(slot, jobs))
    with (ThreadPoolExecutor(jobs) as pool,
          tqdm(total=len(points), desc="sweep", unit="run") as bar):
        try:
            runs = {}
            for place, (name, parameters) in enumerate(points):
                if 0 < place < jobs:
                    time.sleep(3)                      # kernels that start together race for ports
                runs[pool.submit(_run_point, phase, name, parameters, slots, force)] = name
            for run in as_completed(runs):
                bar.update()
                if run.result():
                    failed.append(runs[run])
                    output = results_folder() / phase / runs[run] / "output.txt"
                    bar.write(f"{runs[run]} failed; see {output}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def slot_environment(slot: int, slots: int) -> dict[str, str]:
    """Variables of a run beside others: its share of the cores, and an accelerator of its own.

    Where there are more runs than accelerators, they take turns in sharing one.
    """
    environment = {}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // slots))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = (range(torch.cuda.device_count()) if visible is None
             else [card.strip() for card in visible.split(",") if card.strip()])
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = str(cards[slot % len(cards)])
    return environment


def _run_point(phase: str, name: str, parameters: dict, slots: SimpleQueue, force: bool) -> int:
    """Runs one point in a process of its own, which writes output.txt; returns its exit status."""
    folder = results_folder() / phase / name
    folder.mkdir(parents=True, exist_ok=True)
    slot = slots.get()
    try:
        with (tempfile.TemporaryDirectory() as scratch,
              (folder / "output.txt").open("w", encoding="utf-8") as output):
            file = Path(scratch) / f"{name}.yaml"
            file.write_text(json.dumps(parameters), encoding="utf-8")
            command = [sys.executable, "-m", "dlr", "run", phase, "--params", str(file),
                       "--name", name]
            return subprocess.run(command + ["--force"] * force, stdout=output,
                                  stderr=subprocess.STDOUT, cwd=project_root(),
                                  env=os.environ | slot | {"DLR_TERMINAL": "1"}).returncode
    finally:
        slots.put(slot)


def write_table(path: str | Path, table: pd.DataFrame, prefix: str = "") -> tuple[str, Path]:
    """A sweep's means over seeds (of rows that name no variant: all) and the file that keeps them.

    That is table.md of the phase while this sweep's runs are all there are; beside others it gets a
    name of its own.
    """
    phase = str(read_params(path)["phase"])
    text = (seeds_table(table) if "variant" in table else table).to_markdown(index=False)
    alone = finished_runs(phase).keys() <= set(table["run"])
    name = "table" if alone else f"table-{prefix or slug(Path(path).stem)}"
    file = results_folder() / phase / f"{name}.md"
    write_atomically(file, text + "\n")
    return text, file
