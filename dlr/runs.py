"""Run folders: settings, provenance and, once the measurements are done, metrics.json.

results/<phase>/<run>/   run.json (settings, versions, seed, hardware, data hash, git commit),
                         log.csv, checkpoint/ (best/ beside it, where an earlier step was
                         better), the executed notebook, metrics.json, and the table and figures
                         drawn from it
"""

import contextlib
import hashlib
import importlib.metadata as metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
METRICS, RECORD = "metrics.json", "run.json"
# What an unfinished run goes on from, as patterns below its folder.
TO_RESUME = ("*/trainer", "*/harm-*.safetensors")
# What a run writes: all that a forced run removes before it starts.
LEFT_BEHIND = (METRICS, RECORD, "log.csv", "table.md", "notebook.ipynb", "output.txt",
               "record.json", "record.safetensors", "frequencies.safetensors",
               "oracle.safetensors", "tasks", "checkpoint", "best", "trainer", "*/log.csv",
               "*/checkpoint", "*/best", *TO_RESUME)


def project_root() -> Path:
    """The folder that holds `notebooks/` and `results/`."""
    return Path(__file__).resolve().parent.parent


def shell_folder() -> Path:
    """The folder that relative paths are meant from: the current one, but a notebook's project.

    JupyterLab starts kernels in notebooks/, while whoever started it stood in the project.
    """
    here = Path.cwd()
    return project_root() if here == project_root() / "notebooks" else here


def from_project(where: str | Path) -> Path:
    """`where` as a path; a relative one that is not here is meant from the project's root."""
    path = Path(where).expanduser()
    return path if path.is_absolute() or path.exists() else project_root() / path


def folder_from(variable: str, default: Path) -> Path:
    """The folder an environment variable names, absolute, or `default`."""
    given = os.environ.get(variable)
    return shell_folder() / Path(given).expanduser() if given else default


def results_folder() -> Path:
    """`$DLR_RESULTS`, or results/ in the project."""
    return folder_from("DLR_RESULTS", project_root() / "results")


def shown_path(path: Path) -> str:
    """`path` as people read it: from the project's root where it lies below."""
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def temporary(path: Path) -> Path:
    """A name beside `path` that no process takes too, here or on a machine that shares the disk."""
    host = slug(platform.node())[:40]
    return path.with_name(f".{path.name}.{host}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def atomic_file(path: Path):
    """A temporary file beside `path` that takes its place when the block ends, whole.

    Raises:
        OSError: the disk is full or read-only. Nothing is left behind; the message names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(path)
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, f"Could not write {str(path)!r} ({error.strerror}); nothing was "
                                   "changed. Free some space or choose another folder with "
                                   "DLR_RESULTS.") from error
    finally:
        new.unlink(missing_ok=True)


def slug(text: str) -> str:
    """`text` as part of a file name; never empty, a path or a hidden file."""
    name = re.sub(r"[^\w.=+-]+", "-", text).strip("-.")
    return name or "x" + hashlib.sha256(text.encode()).hexdigest()[:6]


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all; text as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """Writes a safetensors file whole or not at all."""
    with atomic_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    return path


def save_figure(picture, folder: Path, name: str) -> Path:
    """Writes a matplotlib figure as name.png and name.pdf; returns the PNG's path.

    Neither holds a date or a version, so that the same figure is the same file.
    """
    nameless = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None},
                "png": {"Software": None}}
    for ending, metadata in nameless.items():
        with atomic_file(folder / f"{name}.{ending}") as new:
            picture.savefig(new, format=ending, metadata=metadata)
    return folder / f"{name}.png"


def plain(value):
    """`value` with NaN and infinities as None, so that the JSON is standard."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _git_commit() -> str:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(),
                                capture_output=True, text=True)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def hardware() -> dict:
    """Processor or accelerator, cores and threads; no host names or paths."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "accelerator": device}


class Run:
    """One run's folder. `begin` records where it comes from; `finish` its metrics: it is `done`.

    Args:
        reused: it was finished earlier, so it is shown and never written to.
    """

    def __init__(self, folder: str | Path, reused: bool = False):
        self.folder = Path(folder)
        self.reused = reused
        self._started = time.time()

    @property
    def done(self) -> bool:
        return (self.folder / METRICS).is_file()

    @property
    def exists(self) -> bool:
        """Whether a run was ever begun here."""
        return self.done or (self.folder / RECORD).is_file()

    def forget_if_empty(self) -> None:
        """Drops the settings of a run that failed before any work: they would hold its place."""
        left = {path for pattern in LEFT_BEHIND for path in self.folder.glob(pattern)}
        if {path.name for path in left} <= {RECORD, "notebook.ipynb", "output.txt"}:
            (self.folder / RECORD).unlink(missing_ok=True)

    @property
    def record(self) -> dict:
        """run.json, empty where it is missing or cannot be read."""
        try:
            return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @property
    def metrics(self) -> dict:
        """metrics.json of a finished run."""
        return json.loads((self.folder / METRICS).read_text(encoding="utf-8"))

    @property
    def rows(self) -> list[dict]:
        """One row a variant, of a finished run."""
        return self.metrics["rows"]

    def begin(self, settings: dict, data_hash: str, inputs: dict[str, str]) -> "Run":
        """Writes run.json: what the run is of, and made on. `identity.begin` compares first."""
        versions = {"python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in VERSIONS}
        record = {"settings": settings, "seed": settings.get("seed"), "data_hash": data_hash,
                  "inputs": inputs, "versions": versions, "hardware": hardware(),
                  "git_commit": _git_commit(),
                  "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_atomically(self.folder / RECORD, json.dumps(plain(record), indent=2) + "\n")
        return self

    def finish(self, rows: list[dict], **extra) -> dict:
        """Writes metrics.json: `rows`, one a variant, and whatever else the run found."""
        metrics = plain({"rows": rows, "seconds": round(time.time() - self._started, 1)} | extra)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=1) + "\n")
        for path in [path for pattern in TO_RESUME for path in self.folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return metrics

    def clear(self) -> None:
        """Removes what a run leaves, and nothing else that may lie in its folder."""
        paths = [path for pattern in LEFT_BEHIND for path in self.folder.glob(pattern)]
        for png in self.folder.glob("*.png"):
            pdf = png.with_suffix(".pdf")
            paths += [png, pdf] if pdf.is_file() else []           # a figure is kept as both
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # -- what notebooks show -----------------------------------------------------------------------
    def table(self, table: pd.DataFrame) -> pd.DataFrame:
        """`table` as it is, which the run keeps as table.md unless it is only shown."""
        if not self.reused:
            write_atomically(self.folder / "table.md", table.to_markdown(index=False) + "\n")
        return table

    def logs(self, names: dict[str, str]) -> dict[str, pd.DataFrame]:
        """Training logs of those of `names` (variant to subfolder) that were trained here."""
        paths = {name: self.folder / folder / "log.csv" for name, folder in names.items()}
        return {name: pd.read_csv(path) for name, path in paths.items() if path.is_file()}

    def figure(self, picture, name: str) -> None:
        """Keeps a figure beside the metrics, unless this run is only shown. None: nothing drawn."""
        if picture is not None and not self.reused:
            save_figure(picture, self.folder, name)


# What a row of results is a case of, and how people call it: rows recorded before they had a kind
# were named so. Controls of a router (shuffled, mean, random) run on its weights.
KINDS = {"routed": "DLR", "shuffled": "shuffled", "mean": "mean plan", "random": "random plan",
         "static": "best static", "dense": "dense LoRA", "stochastic": "stochastic depth",
         "base": "base"}


def kind_of(row: dict) -> str:
    """The kind of a results row, one of KINDS."""
    if isinstance(row.get("kind"), str):
        return row["kind"]
    name = row["variant"]
    for kind, words in KINDS.items():
        if name == words or name.endswith(f", {words}"):
            return kind
        if kind == "stochastic" and name.startswith(words):        # 'stochastic depth, 40% dropped'
            return kind
    return "routed"


def alike(runs: dict[str, Run]) -> dict[tuple[str, str, int], dict[str, Run]]:
    """Runs by model, dataset and steps, in whose figure or table they stand together."""
    groups: dict[tuple[str, str, int], dict[str, Run]] = {}
    for name, run in runs.items():
        settings = run.record.get("settings", {})
        key = settings.get("model", ""), settings.get("dataset", ""), settings.get("steps", 0)
        groups.setdefault(key, {})[name] = run
    return groups


def finished_runs(phase: str, root: Path | None = None) -> dict[str, dict]:
    """Run name to {'metrics', 'run'} for every finished run of a phase, by name."""
    folder = (root or results_folder()) / phase
    runs = [Run(path.parent) for path in sorted(folder.glob(f"*/{METRICS}"))]
    return {run.folder.name: {"metrics": run.metrics, "run": run.record} for run in runs}
