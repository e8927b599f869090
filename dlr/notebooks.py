"""Notebooks as programs: which half of a pair runs, in which Python, and what is kept of an executed one."""

import ast
import contextlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

from dlr.phases import PHASES
from dlr.runs import atomic_file, project_root
from dlr.settings import SettingsError

_BAR = re.compile(r"\d+%\|")                                   # a tqdm bar, whatever it counts


def folder() -> Path:
    return project_root() / "notebooks"


# -- the pair -----------------------------------------------------------------------
def _cells(notebook) -> list[tuple]:
    return [(cell.cell_type, cell.source.strip(), tuple(cell.metadata.get("tags", []))) for cell in notebook.cells]


def read_pair(name: str, say=print):
    """The notebook `name` as it is to run: where its two halves differ, the half that was saved last; says so.

    Raises:
        SettingsError: they differ and were saved at the same time.
        FileNotFoundError: neither half is there.
    """
    halves = {suffix: folder() / f"{name}{suffix}" for suffix in (".ipynb", ".py")}
    there = [path for path in halves.values() if path.is_file()]
    if not there:
        raise FileNotFoundError(f"There is no notebook {name!r} in {str(folder())!r}.")
    notebooks = {path.suffix: _read(path) for path in there}
    if len(there) == 1 or _cells(notebooks[".ipynb"]) == _cells(notebooks[".py"]):
        return notebooks[there[0].suffix]
    saved = {suffix: path.stat().st_mtime_ns for suffix, path in halves.items()}
    if saved[".ipynb"] == saved[".py"]:
        raise SettingsError(f"{name}.py and {name}.ipynb differ and were saved at the same time. Save the one that is "
                            f"right again, or make them one: jupytext --to ipynb --update notebooks/{name}.py")
    newer = max(saved, key=saved.get)
    say(f"{name}.py and {name}.ipynb differ: {name}{newer}, saved last, is what runs.")
    return notebooks[newer]


def _read(path: Path):
    if path.suffix == ".py":
        import jupytext
        return jupytext.read(path)
    return nbformat.read(path, as_version=4)


def cell_defaults(notebook) -> dict:
    """Name to value of the plain assignments in a notebook's parameters cell."""
    source = next((c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])), "")
    found = {}
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        with contextlib.suppress(ValueError):
            if isinstance(target, ast.Name):
                found[target.id] = ast.literal_eval(node.value)
    return found


# -- execution -----------------------------------------------------------------------
def _same_python():
    """A kernel manager that starts this very Python, whatever kernel is registered as 'python3'.

    Raises:
        SettingsError: this Python has no ipykernel.
    """
    if importlib.util.find_spec("ipykernel") is None:
        raise SettingsError(f"{sys.executable} has no ipykernel, which runs the notebooks. Install what is missing: "
                            f"{sys.executable} -m pip install -r requirements.txt")
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class SamePython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            from ipykernel.kernelspec import get_kernel_dict
            about = get_kernel_dict()
            about["argv"].append("--log-level=ERROR")            # else it warns that it talks to us without encryption
            return KernelSpec(**about)
    return SamePython


def execute(notebook, target: Path, parameters: dict, quiet: bool = False) -> Path:
    """Executes a notebook through papermill's API into `target`, which is kept, tidied, also when a cell failed.

    The kernel runs under this Python, in notebooks/. One that does not start is tried once more.
    """
    import papermill
    manager = _same_python()
    logging.getLogger("papermill").setLevel(logging.ERROR)     # it warns of settings that are not in the parameters cell
    target.parent.mkdir(parents=True, exist_ok=True)
    streams = {} if quiet else {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    os.environ["DLR_TERMINAL"] = "1"
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    try:
        for attempt in (1, 2):
            try:
                papermill.execute_notebook(
                    notebook, str(target), parameters=parameters, cwd=str(folder()), kernel_name="python3",
                    language="python", progress_bar=False, log_output=False, kernel_manager_class=manager, **streams)
                break
            except (RuntimeError, TimeoutError) as error:
                if attempt == 2 or "Kernel" not in str(error):
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
    """Executes committed notebooks anew, in place, with their defaults: recorded runs that fit are shown.

    Args:
        names: notebooks by name, number or phase; none: all.

    Raises:
        SettingsError: no such notebook.
    """
    known = {key: name for phase, (name, _) in PHASES.items() for key in (phase, name, name[:2])}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(f"no notebook {unknown[0]!r}; there are: {', '.join(name for name, _ in PHASES.values())}")
    for name in dict.fromkeys(known[name] for name in names or list(PHASES)):
        say(f"{name}: executing", flush=True)
        notebook = read_pair(name, say)
        about = {"jupytext": notebook.metadata.get("jupytext", {}), "language_info": {"name": "python"},
                 "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        with tempfile.TemporaryDirectory() as elsewhere:
            executed = execute(notebook, Path(elsewhere) / f"{name}.ipynb", {}, quiet=True)
            notebook = nbformat.read(executed, as_version=4)
        for cell in notebook.cells:
            cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        notebook.metadata = nbformat.from_dict(about)
        write(notebook, folder() / f"{name}.ipynb")
        if _cells(_read(folder() / f"{name}.py")) != _cells(notebook):
            import jupytext
            jupytext.write(notebook, folder() / f"{name}.py", fmt="py:percent")
