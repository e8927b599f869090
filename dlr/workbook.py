"""Notebooks as programs: papermill runs of one phase, sweeps over grids, and what a notebook's own first cells need."""

import itertools
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from pydantic import BaseModel

from dlr.config import PHASES, SettingsError, read_params, validated
from dlr.progress import tqdm
from dlr.runs import Run, atomic_file, finished_runs, project_root, results_folder

# What DLR_PRESET=toy changes: every cell of every notebook runs, in seconds. For tests; never for results.
TOY = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_len": 32, "calibration_docs": 4, "eval_docs": 4,
       "warm_tokens": 64, "warm_epochs": 1, "warm_rounds": 1, "penalties": [1.0], "dropped": [0.4],
       "layers": 5, "width": 64, "vocab_size": 300, "save_steps": 2, "bf16": False,
       "lengths": [32], "context": 16, "decode_steps": 2, "repeats": 1, "plan_docs": 2, "skips": [0.5],
       "untrained": True, "record_docs": 6, "oracle_docs": 3, "probe_docs": 6, "oracle_len": 24, "budgets": [0.4],
       "frequency_docs": 4, "limit": 2.0}


def notebook_settings(phase: str, names: dict) -> BaseModel:
    """Validated settings from a notebook's globals, to be called in the cell after its parameters.

    Names that papermill injected and no setting has are refused, with the nearest real name.
    """
    schema = PHASES[phase][1]
    given = {k: v for k, v in names.items() if k in schema.model_fields}
    if "_dlr_checked" not in names:
        plain = (bool, int, float, str, list, dict)
        stray = {k: v for k, v in names.items()
                 if not k.startswith("_") and type(v) in plain and k not in ("In", "Out") and k not in given}
        validated(given | stray, schema)
        names["_dlr_checked"] = True
    if os.environ.get("DLR_PRESET") == "toy":
        given |= {k: v for k, v in TOY.items() if k in schema.model_fields}
    return validated(given, schema)


def checked_parameters(phase: str, params_file: str | None, assignments: list[str]) -> dict:
    """Parameters from a YAML file and `name=value` pairs, validated before any kernel starts."""
    import yaml
    if phase not in PHASES:
        raise SettingsError(f"unknown phase {phase!r}; there are: {', '.join(PHASES)}")
    given = read_params(params_file) if params_file else {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise SettingsError(f"--set {assignment!r} must read name=value, for example --set target_skip=0.3")
        given[name] = yaml.safe_load(value)
    validated(given, PHASES[phase][1])
    return given


def run_notebook(phase: str, parameters: dict, quiet: bool = False) -> Path:
    """Executes a phase's notebook through papermill's API; returns the folder of its results.

    The executed notebook is kept there, also when a cell failed. A kernel that does not start is tried once more.
    """
    import papermill
    logging.getLogger("papermill").setLevel(logging.ERROR)        # it warns of settings that are not in the parameters cell
    name = parameters.get("run_name", "default")
    folder = results_folder() / phase / name
    folder.mkdir(parents=True, exist_ok=True)
    notebooks = project_root() / "notebooks"
    streams = {} if quiet else {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    os.environ["DLR_TERMINAL"] = "1"
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(notebooks / f"{PHASES[phase][0]}.ipynb"), str(folder / "notebook.ipynb"), parameters=parameters,
                cwd=str(notebooks), kernel_name="python3", progress_bar=False, log_output=False, **streams)
            break
        except (RuntimeError, TimeoutError) as error:
            if attempt == 2 or "Kernel" not in str(error):
                raise
    tidy(folder / "notebook.ipynb")
    return folder


def tidy(path: Path) -> None:
    """Drops from an executed notebook what is no result: stderr (bars, warnings) and papermill's absolute paths."""
    import nbformat
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    for name in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(name, None)
    with atomic_file(path) as temporary:
        nbformat.write(notebook, temporary)


def results_table(phase: str, root: Path | None = None) -> pd.DataFrame:
    """Every row of every finished run of a phase, with the run's name."""
    runs = finished_runs(phase, root)
    rows = [{"run": name, **row} for name, found in runs.items() for row in found["metrics"]["rows"]]
    return pd.DataFrame(rows)


def seeds_table(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of measured skip and perplexity, one row a target and variant."""
    data = table.assign(target_skip=table["target_skip"].where(table["variant"].str.contains("DLR|static"), "-"))
    found = data.groupby(["variant", "target_skip"], sort=False).agg(
        runs=("perplexity", "size"), skip=("skip", "mean"), skip_sd=("skip", "std"), perplexity=("perplexity", "mean"),
        perplexity_sd=("perplexity", "std")).reset_index()
    return found.sort_values(["skip", "perplexity"]).round({"skip": 4, "skip_sd": 4, "perplexity": 2, "perplexity_sd": 2})


# -- sweeps -----------------------------------------------------------------------------------------------------------
def expand(sweep: dict) -> list[tuple[str, dict]]:
    """(run name, parameters) of every point of a sweep file.

    A sweep file holds `phase`, optional `common` settings, and `grid`: mappings whose lists are multiplied out. Lists
    of a setting that is itself a list are written as lists of lists.
    """
    unknown = sorted(sweep.keys() - {"phase", "common", "grid"})
    if unknown or "phase" not in sweep or "grid" not in sweep:
        raise SettingsError("a sweep file holds phase, grid and, if you like, common"
                            + (f"; unknown: {', '.join(unknown)}" if unknown else ""))
    if sweep["phase"] not in PHASES:
        raise SettingsError(f"unknown phase {sweep['phase']!r}; there are: {', '.join(PHASES)}")
    points = []
    for axes in sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]:
        lists = {k: v if isinstance(v, list) else [v] for k, v in axes.items()}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values))
            name = "-".join(f"{k}={v}" if not isinstance(v, str) else v for k, v in chosen.items())
            name = re.sub(r"[^\w.=+-]+", "-", name).strip("-")          # a model's path must not become a folder's
            parameters = {**(sweep.get("common") or {}), **chosen, "run_name": name}
            validated(parameters, PHASES[sweep["phase"]][1])
            points.append((name, parameters))
    return points


def run_sweep(path: str | Path, jobs: int = 1) -> tuple[pd.DataFrame, list[str]]:
    """Runs what a sweep file asks for and is not there yet, `jobs` at a time; returns the table and the failed runs."""
    import tempfile

    import yaml
    sweep = read_params(path)
    phase, points = sweep.get("phase"), expand(sweep)
    root = results_folder() / str(phase)
    waiting = [(name, parameters) for name, parameters in points if not Run(root / name).done]
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
                file.write_text(yaml.safe_dump(parameters), encoding="utf-8")
                output = (root / name / "output.txt").open("w", encoding="utf-8")
                running[subprocess.Popen([sys.executable, "-m", "dlr", "run", phase, "--params", str(file)], stdout=output,
                                         stderr=subprocess.STDOUT, env=environment, cwd=project_root())] = (name, output)
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
    return results_table(str(phase)), failed


def say_error(error: BaseException) -> str:
    """One clear sentence for the terminal; the last line of a notebook's own error where papermill wraps one."""
    if type(error).__name__ == "PapermillExecutionError":
        return f"{error.ename}: {error.evalue}"
    return str(error) or type(error).__name__

