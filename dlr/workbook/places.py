"""Where a run goes, for notebooks and the command line. What another run left is never touched.

A named run is results/<phase>/<name>. A notebook without a name explores: a recorded run of the
same settings and data is shown; otherwise the run goes to results/scratch/<phase>/<the settings
that differ>, which git ignores.
"""

import hashlib
import json
from pathlib import Path

from dlr.base import identity
from dlr.runs import Run, plain, project_root, results_folder, shown_path, slug
from dlr.settings import Settings

SCRATCH = "scratch"


def _name(values: dict) -> str:
    """'target_skip=0.3-seed=1'; what would be long is a hash."""
    parts = []
    for name, value in values.items():
        text = slug(value if isinstance(value, str) and value else json.dumps(value))
        parts.append(f"{name}={text if len(text) <= 40 else _short_hash(value)}")
    name = "-".join(parts)
    return name if len(name) <= 80 else f"{parts[0]}-{_short_hash(values)}"


def _short_hash(*values) -> str:
    text = json.dumps(plain(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Wanted:
    """A run that is to be: its settings and, read when first asked for, its data."""

    def __init__(self, phase: str, config: Settings):
        self.phase = phase
        self.config = config
        self._data = None

    @property
    def data(self) -> tuple[str, dict]:
        """(data hash, inputs)."""
        if self._data is None:
            self._data = identity.data_hash(self.config), identity.inputs_of(self.config)
        return self._data

    def differences(self, run: Run) -> dict[str, tuple]:
        """What keeps `run` from being this one: settings, or where those are equal, data."""
        settings = self.config.model_dump()
        schema = type(self.config)
        pairs = identity.differences(run, settings, "", {}, schema)
        try:
            return pairs or identity.differences(run, settings, *self.data, schema)
        except OSError:                # the data is not on this machine: settings must do
            return pairs

    def fits(self, run: Run) -> bool:
        return run.exists and not self.differences(run)

    def free(self, folder: Path) -> Run:
        """The run in `folder`; where that is another one, a run beside it named by a hash."""
        run = Run(folder)
        if run.exists and self.differences(run):
            ending = _short_hash(self.config.model_dump(), *self.data)
            run = Run(folder.with_name(f"{folder.name}-{ending}"))
        return run

    def start(self, run: Run) -> Run:
        return identity.begin(run, self.config.model_dump(), *self.data, type(self.config))


def provenance(run: Run) -> str:
    """When and on what a run was made."""
    record = run.record
    parts = record.get("hardware") or {}
    machine = parts.get("accelerator") or parts.get("processor")
    day = record.get("started", "an unknown day")[:10]
    return f"made on {day}" + (f" on {machine}" if machine else "")


def _recorded(phase: str) -> list[Run]:
    """Finished runs of a phase: in the results folder, in the project's, and exploratory ones."""
    results, shipped = results_folder(), project_root() / "results"
    folders = dict.fromkeys([results / phase, shipped / phase, results / SCRATCH / phase])
    runs = [Run(path, reused=True) for folder in folders if folder.is_dir()
            for path in sorted(folder.iterdir())]
    return [run for run in runs if run.done]


def open_run(phase: str, config: Settings, say=print, fresh: bool = False) -> Run:
    """The run of a notebook, begun, or a finished one that is only to be shown (`run.done`).

    Args:
        say: is told which run it is, and where.
        fresh: what is there of a run that is not finished is removed first.

    Raises:
        SettingsError: `config.run_name` is a run of other settings or data.
    """
    wanted = Wanted(phase, config)
    if config.run_name:
        run = named(wanted, config.run_name)
        run.reused = run.done
    else:
        run = next((run for run in _recorded(phase) if wanted.fits(run)), None)
        if run is None:
            run = wanted.free(results_folder() / SCRATCH / phase / scratch_name(config))
    if run.done:
        say(f"{shown_path(run.folder)} holds this run, {provenance(run)}: shown from there. Give "
            "run_name a name of your own to run it here.")
        return run
    if fresh:
        run.clear()
    begun = ", where this run was begun before: it goes on (open_run(..., fresh=True) begins it " \
            "anew)" if run.exists else ""
    say(f"Results go to {shown_path(run.folder)}{begun}.")
    return wanted.start(run)


def scratch_name(config: Settings) -> str:
    """The settings of an exploratory run that are not the defaults, as a folder's name."""
    changed = identity.different_settings({}, plain(config.model_dump()), type(config))
    return _name({name: new for name, (_, new) in changed.items()}) or "default"


def named(wanted: Wanted, name: str, force: bool = False) -> Run:
    """The run `name` of a phase, new, begun or finished.

    Raises:
        SettingsError: it holds other settings or data, and `force` does not replace it.
    """
    run = Run(results_folder() / wanted.phase / name)
    if run.exists and not force:
        identity.refuse(run, wanted.differences(run))
    return run


def beside(wanted: Wanted, name: str, say=print) -> Run:
    """The run `name` if that is this run or nobody's; else one beside it, named by what differs."""
    run = Run(results_folder() / wanted.phase / name)
    pairs = wanted.differences(run) if run.exists else {}
    if not pairs:
        return run
    ending = _name({key: new for key, (_, new) in pairs.items()})
    place = wanted.free(run.folder.with_name(f"{name}-{ending}"))
    say(f"{shown_path(run.folder)} holds a run with other settings or data "
        f"({identity.said(pairs)}); this one is {shown_path(place.folder)}.")
    return place
