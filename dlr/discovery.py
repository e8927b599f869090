"""Finding a checkpoint: in a folder, in a run, or the newest of a phase, saying which one was taken.

Order: the folder itself; its `best`, then the finished `checkpoint`, then the `last` state of its training; and for a phase
the same in its newest complete run. Half-written checkpoints are skipped with a warning.
"""

import warnings
from pathlib import Path

from dlr.config import PHASES
from dlr.folder import looks_like, missing_part  # noqa: F401
from dlr.models import NANO_ROUTER
from dlr.runs import METRICS, project_root, results_folder

_BEST, _LAST = ("best", "checkpoint-best", "checkpoint"), ("last", "checkpoint-last")


class HalfWritten(UserWarning):
    """A checkpoint folder that lacks a part, and was skipped."""


def from_project(where: str | Path) -> Path:
    """`where` as a path; a relative one that is not here is taken from the project's root (kernels run in notebooks/)."""
    path = Path(where).expanduser()
    return path if path.is_absolute() or path.exists() else project_root() / path


def _candidates(folder: Path) -> list[tuple[str, Path]]:
    """(how it is called aloud, folder), best first, in a run's or a variant's folder."""
    def number(path: Path) -> int:
        tail = path.name.rsplit("-", 1)[-1]
        return int(tail) if tail.isdigit() else -1

    found = [("best", folder / name) for name in _BEST]
    found += [("half-written", path) for path in folder.glob(".checkpoint.*.tmp")]
    found += [("last", folder / name) for name in _LAST]
    found += [("last", path) for path in sorted(folder.glob("trainer/checkpoint-*"), key=number, reverse=True)]
    return [(label, path) for label, path in found if path.is_dir()]


def _search(folder: Path) -> tuple[str, Path] | None:
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inner.sort(key=lambda path: path.name not in ("router", "DLR"))             # a routed model before its controls
    found = [(label, path) for place in (folder, *inner) for label, path in _candidates(place)]
    for label, path in sorted(found, key=lambda entry: entry[0] == "last"):     # any best one before any last one
        problem = missing_part(path)
        if problem is None:
            return label, path
        if looks_like(path) or path.name.startswith("."):
            warnings.warn(f"Skipped the half-written checkpoint {str(path)!r}: {problem}.", HalfWritten, stacklevel=3)
    return None


def find_checkpoint(where: str | Path, say=print) -> Path:
    """The checkpoint folder meant by `where`: such a folder, a run's or variant's folder, a phase, or 'nano-router'.

    Raises:
        FileNotFoundError: there is none; the message says where was looked.
    """
    if str(where) == "nano-router":
        where = NANO_ROUTER
        if not looks_like(NANO_ROUTER):
            raise FileNotFoundError("The embedded model's own router (dlr/nano/router) is not in this copy of the project. "
                                    "Train one with 'python -m dlr run' and give its checkpoint folder.")
    folder = from_project(where)
    if folder.is_dir():
        if looks_like(folder):
            problem = missing_part(folder)
            if problem:
                raise FileNotFoundError(f"The checkpoint {str(folder)!r} is half-written: {problem}. Give another one, or "
                                        "run its training again.")
            return folder
        found = _search(folder)
        if found:
            say(f"checkpoint: {found[0]} of {folder.name}: {found[1]}")
            return found[1]
        raise FileNotFoundError(f"{str(folder)!r} holds no complete checkpoint: looked for {', '.join(_BEST + _LAST)} and "
                                "trainer/checkpoint-*, here and one folder down.")
    if str(where) in PHASES:
        runs = sorted((results_folder() / str(where)).glob(f"*/{METRICS}"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in runs:
            found = _search(path.parent)
            if found:
                say(f"checkpoint: {found[0]} of the newest complete run with one, {path.parent.name}: {found[1]}")
                return found[1]
        raise FileNotFoundError(f"None of the {len(runs)} complete runs of {where!r} holds a checkpoint; train one with "
                                f"'python -m dlr run {where}'.")
    raise FileNotFoundError(f"{str(where)!r} is neither a folder nor a phase; the phases are {', '.join(PHASES)}. For a "
                            "base model give 'nano', a folder with config.json, or a Hub id with --variant base.")
