"""A copy of the project as a clone would hold it, to run commands and notebooks in."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dlr.base.identity import data_hash
from dlr.runs import Run, project_root
from dlr.workbook.phases.training import ParetoConfig


def tracked() -> list[str]:
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=project_root(), capture_output=True,
                            text=True)
    if answer.returncode or not answer.stdout:
        pytest.skip("this copy of the project is no git clone, so what a clone holds is not known")
    return [name for name in answer.stdout.split("\0")
            if name and (project_root() / name).is_file()]


def copy_project(folder: Path) -> Path:
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(project_root() / name, folder / name)
    return folder


def contents(folder: Path, below: str = "") -> dict[str, str]:
    """Hash of every tracked file of a copy (below a folder of it); '' where it is gone."""
    paths = {name: folder / name for name in tracked() if name.startswith(below)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for name, path in paths.items()}


def needs_the_recorded_corpus() -> None:
    """Skips where this Python's docstrings make the embedded corpus another than the runs'."""
    first = next((project_root() / "results" / "pareto").glob("*/run.json"))
    recorded = Run(first.parent).record["data_hash"]
    if data_hash(ParetoConfig()) != recorded:
        pytest.skip("the embedded corpus of this Python version is not the recorded runs': they "
                    "are run anew, which takes hours")


def environment(folder: Path, **changes) -> dict[str, str]:
    """For processes in a copy: its own package and results, the toy preset, no network."""
    shared = {k: v for k, v in os.environ.items() if k not in ("DLR_RESULTS", "PYTHONPATH")}
    return shared | {
        "PYTHONPATH": str(folder), "DLR_PRESET": "toy", "HF_HUB_OFFLINE": "1", **changes
    }
