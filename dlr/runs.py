"""Run folders: settings, provenance, and metrics.json, written last and atomically.

results/<phase>/<run>/   run.json (settings, versions, seed, hardware, data hash, git commit), log.csv, checkpoint/,
                         the executed notebook, metrics.json
"""

import contextlib
import importlib.metadata as metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
METRICS = "metrics.json"


def project_root() -> Path:
    """The folder that holds `notebooks/` and `results/`."""
    return Path(__file__).resolve().parent.parent


def results_folder() -> Path:
    """`$DLR_RESULTS`, or results/ in the project."""
    return Path(os.environ.get("DLR_RESULTS") or project_root() / "results")


@contextlib.contextmanager
def atomic_file(path: Path):
    """A temporary file beside `path` that takes its place when the block ends: a reader never sees half of it.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind, and the message names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"Could not write {str(path)!r} ({error.strerror}); nothing was changed. Free some "
                                   "space or choose another folder with DLR_RESULTS.") from error
    finally:
        temporary.unlink(missing_ok=True)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")


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
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True)
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
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "accelerator": device}


class Run:
    """One run's folder. `done` says whether it finished; `start` records where it comes from; `finish` its metrics."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._started = time.time()

    @property
    def done(self) -> bool:
        return (self.folder / METRICS).is_file()

    def start(self, settings: dict, data_hash: str) -> "Run":
        """Writes run.json, in which absolute paths are cut to their last part.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        path = self.folder / "run.json"
        settings = {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v for k, v in settings.items()}
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
            changed = sorted(k for k in before.keys() | settings.keys() if before.get(k) != plain(settings).get(k))
            if changed:
                raise ValueError(f"{str(self.folder)!r} holds a run with other settings ({', '.join(changed[:5])}); "
                                 "give this one another name (--name) or remove that folder.")
        record = {"settings": settings, "seed": settings.get("seed"), "data_hash": data_hash,
                  "versions": {"python": platform.python_version()} | {v: metadata.version(v) for v in VERSIONS},
                  "hardware": hardware(), "git_commit": _git_commit(),
                  "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_atomically(path, json.dumps(plain(record), indent=2) + "\n")
        return self

    def finish(self, rows: list[dict], **extra) -> dict:
        """Writes metrics.json: `rows`, one a variant, and whatever else the run found."""
        metrics = plain({"rows": rows, "seconds": round(time.time() - self._started, 1)} | extra)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=1) + "\n")
        return metrics


def finished_runs(phase: str, root: Path | None = None) -> dict[str, dict]:
    """Run name to {'metrics', 'run'} for every finished run of a phase, by name."""
    found = {}
    for path in sorted(((root or results_folder()) / phase).glob(f"*/{METRICS}")):
        run = path.with_name("run.json")
        found[path.parent.name] = {"metrics": json.loads(path.read_text(encoding="utf-8")),
                                   "run": json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}}
    return found
