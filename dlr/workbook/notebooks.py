"""Notebooks as programs: which half of a pair runs, in which Python, and what of it is kept."""

import ast
import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from dlr.runs import atomic_file, project_root
from dlr.settings import SettingsError
from dlr.train.stopping import Stopped, heeding
from dlr.workbook.phases import PHASES

_BAR = re.compile(r"\d+%\|")                                   # a tqdm bar, whatever it counts
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def folder() -> Path:
    return project_root() / "notebooks"


# -- the pair -----------------------------------------------------------------------
def _cells(notebook) -> list[tuple]:
    return [(cell.cell_type, cell.source.strip(), tuple(cell.metadata.get("tags", [])))
            for cell in notebook.cells]


def read_pair(name: str, say=print):
    """The notebook `name` as it is to run: where its halves differ, the one saved last; says so.

    Raises:
        SettingsError: they differ and were saved at the same time.
        FileNotFoundError: neither half is there.
    """
    paths = [folder() / f"{name}{suffix}" for suffix in (".ipynb", ".py")]
    halves = {path: jupytext.read(path) for path in paths if path.is_file()}
    if not halves:
        raise FileNotFoundError(f"There is no notebook {name!r} in {str(folder())!r}.")
    first, *others = halves.values()
    if all(_cells(other) == _cells(first) for other in others):
        return first
    older, newer = sorted(halves, key=lambda path: path.stat().st_mtime_ns)
    if older.stat().st_mtime_ns == newer.stat().st_mtime_ns:
        raise SettingsError(f"{name}.py and {name}.ipynb differ and were saved at the same time. "
                            "Save the one that is right again, or make them one: "
                            f"jupytext --to ipynb --update notebooks/{name}.py")
    say(f"{name}.py and {name}.ipynb differ: {newer.name}, saved last, is what runs.")
    return halves[newer]


def cell_defaults(notebook) -> dict:
    """Name to value of the plain assignments in a notebook's parameters cell."""
    tagged = [cell.source for cell in notebook.cells
              if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    for node in ast.parse("".join(tagged[:1])).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        with contextlib.suppress(ValueError):
            if isinstance(target, ast.Name):
                defaults[target.id] = ast.literal_eval(node.value)
    return defaults


# -- execution -----------------------------------------------------------------------
class SamePython(AsyncKernelManager):
    """Starts this very Python, whatever kernel is registered as 'python3'.

    Attributes:
        newest: the one that was made last, whose kernel a signal is passed on to.
    """
    newest = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        SamePython.newest = self

    @classmethod
    def pass_on(cls) -> None:
        """Asks the kernel to end: a training in it saves its step, and all else ends at once.

        Raises:
            Stopped: there is none yet.
        """
        pid = getattr(getattr(cls.newest, "provisioner", None), "pid", None)
        if pid is None:
            raise Stopped("nothing was begun")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    @property
    def kernel_spec(self):
        from ipykernel.kernelspec import get_kernel_dict  # `execute` says what to do without it
        about = get_kernel_dict()
        about["argv"].append("--log-level=ERROR")         # else it warns of no encryption
        return KernelSpec(**about)


def execute(notebook, target: Path, parameters: dict, quiet: bool = False) -> Path:
    """Executes a notebook through papermill into `target`, which is kept, tidied, if a cell fails.

    The kernel runs under this Python, in notebooks/. One that does not start is tried once more.
    Where this process is asked to end, so is the kernel, and this waits for it.

    Raises:
        SettingsError: this Python has no ipykernel.
        Stopped: this process, or the kernel, was asked to end.
    """
    if importlib.util.find_spec("ipykernel") is None:
        raise SettingsError(f"{sys.executable} has no ipykernel, which runs the notebooks. Install "
                            f"what is missing: {sys.executable} -m pip install -r requirements.txt")
    logging.getLogger("papermill").setLevel(logging.ERROR)   # it warns of settings not in the cell
    target.parent.mkdir(parents=True, exist_ok=True)
    streams = {} if quiet else {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    os.environ["DLR_TERMINAL"] = "1"
    notebook.metadata.setdefault("kernelspec", dict(KERNEL))

    def attempt():
        papermill.execute_notebook(
            notebook, str(target), parameters=parameters, cwd=str(folder()), kernel_name="python3",
            language="python", progress_bar=False, log_output=False,
            kernel_manager_class=SamePython, **streams)

    asked, SamePython.newest = [], None

    def pass_on():
        asked.append(True)
        SamePython.pass_on()

    try:
        with heeding(pass_on):
            try:
                attempt()
            except (RuntimeError, TimeoutError) as error:
                if asked or "Kernel" not in str(error):
                    raise
                attempt()
    except Exception as error:
        if asked or getattr(error, "ename", "") == Stopped.__name__:
            raise Stopped(getattr(error, "evalue", "the same command goes on from what is saved")
                          ) from error
        raise
    finally:
        if target.is_file():
            write(tidied(nbformat.read(target, as_version=4)), target)
    return target


def _is_result(output) -> bool:
    """False for stderr (warnings) and progress bars, as text or as widgets."""
    if output.output_type == "stream":
        return output.name != "stderr"
    text = "".join(output.get("data", {}).get("text/plain", ""))
    return not _BAR.search(text)


def tidied(notebook):
    """An executed notebook without what is no result: stderr, bars, and the machine's paths."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_result(output)]
    for name in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(name, None)
    return notebook


def write(notebook, path: Path) -> None:
    """Writes a notebook whole or not at all."""
    with atomic_file(path) as temporary:
        nbformat.write(notebook, temporary)


def refresh(names: list[str], say=print) -> None:
    """Executes committed notebooks anew, in place, by their defaults: recorded runs are shown.

    Args:
        names: notebooks by name, number or phase; none: all.

    Raises:
        SettingsError: no such notebook.
    """
    known = {key: name for phase, (name, _) in PHASES.items() for key in (phase, name, name[:2])}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(f"no notebook {unknown[0]!r}; there are: "
                            + ", ".join(name for name, _ in PHASES.values()))
    for name in dict.fromkeys(known[name] for name in names or list(PHASES)):
        say(f"{name}: executing", flush=True)
        notebook = read_pair(name, say)
        about = {"jupytext": notebook.metadata.get("jupytext", {}),
                 "language_info": {"name": "python"}, "kernelspec": KERNEL}
        with tempfile.TemporaryDirectory() as elsewhere:
            executed = execute(notebook, Path(elsewhere) / f"{name}.ipynb", {}, quiet=True)
            notebook = nbformat.read(executed, as_version=4)
        if any(WIDGET in output.get("data", {}) for cell in notebook.cells
               for output in cell.get("outputs", [])):
            about["widgets"] = notebook.metadata.get("widgets", {})      # what a page shows of them
        for cell in notebook.cells:
            tags = cell.metadata.get("tags")
            cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        notebook.metadata = nbformat.from_dict(about)
        write(notebook, folder() / f"{name}.ipynb")
        if _cells(jupytext.read(folder() / f"{name}.py")) != _cells(notebook):
            jupytext.write(notebook, folder() / f"{name}.py", fmt="py:percent")
