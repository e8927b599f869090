"""One run of one phase: its notebook is executed, unless that run is finished."""

import os
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

from dlr.runs import results_folder, shown_path
from dlr.workbook.phases import PHASES
from dlr.workbook.places import Wanted, beside, named, provenance
from dlr.workbook.runner import effective_of


def run_phase(phase: str, parameters: dict, name: str, is_given: bool, force: bool,
              fresh: bool = False) -> None:
    """Runs one phase's notebook, unless that is finished.

    Args:
        name: of the run's folder; where nobody gave it, another run that holds it is left alone.
        force: whatever is there is removed first, trainer's states too.
        fresh: so is what is not finished.
    """
    from dlr.workbook import notebooks  # late: its libraries take a second
    notebook = notebooks.read_pair(PHASES[phase].notebook)
    wanted = Wanted(phase, effective_of(phase, parameters, notebook))
    place = named(wanted, name, force) if is_given else beside(wanted, name)
    if place.done and not force:
        print(f"{phase}: finished before, {provenance(place)}; --force runs it again, --name keeps "
              f"both. {shown_path(place.folder)}")
        return
    if force or fresh:
        place.clear()
    started = time.time()
    print(f"{phase}: running notebook, results in {place.folder}", flush=True)
    try:
        notebooks.execute(notebook, place.folder / "notebook.ipynb",
                          parameters | {"run_name": place.folder.name})
    except BaseException:
        place.forget_if_empty()
        raise
    print(f"{phase}: done in {(time.time() - started) / 60:.1f} minutes")
    for label, pattern in (("executed notebook", "notebook.ipynb"), ("results table", "table.md"),
                           ("figure", "*.png")):
        for path in sorted(place.folder.glob(pattern)):
            print(f"  {label:<18} {path}")


def run_point(phase: str, name: str, parameters: dict) -> None:
    """Runs a point of a sweep in this process; what it says goes to output.txt in its folder.

    Its kernel ends with this process. Jupyter's files about kernels and IPython's history lie on
    the machine's own disk: locks on a shared one fail.
    """
    folder = results_folder() / phase / name
    folder.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory() as here,
          (folder / "output.txt").open("a", buffering=1, encoding="utf-8") as output,
          redirect_stdout(output), redirect_stderr(output)):
        os.environ |= {"JUPYTER_RUNTIME_DIR": here, "IPYTHONDIR": here}
        try:
            run_phase(phase, parameters, name, is_given=True, force=False)
        except BaseException:
            traceback.print_exc(file=output)
            raise
