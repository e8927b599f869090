"""Finding a checkpoint: in a folder, in a run, or the newest of a phase.

Order: the folder itself; its finished `checkpoint`, which results are measured on; its `best`, of
an earlier step; then the `last` state of its training; and for a phase the same in its newest
complete run. `best` is so never compared with another variant's last state unless it is named.
Half-written checkpoints are skipped with a warning.
"""

import json
import warnings
from pathlib import Path

from dlr.base.folder import CONFIG, looks_like, missing_part
from dlr.base.models import NANO_ROUTER, SMOLLM2_ROUTER
from dlr.routing.weights import NANO_NAME
from dlr.runs import METRICS, from_project, results_folder

EMBEDDED = "embedded router"            # its label; on a command line it is 'nano-router'
SMOLLM2 = "SmolLM2 router"              # the same; 'smollm2-router'
_MADE = ("checkpoint", "best", "checkpoint-best")
_LAST = ("last", "checkpoint-last")


class HalfWritten(UserWarning):
    """A checkpoint folder that lacks a part, and was skipped."""


def checkpoints(root: Path | None = None) -> dict[str, Path]:
    """Label to folder: the routers that come along, those of finished runs, `scratch/` last."""
    shipped = {EMBEDDED: NANO_ROUTER, SMOLLM2: SMOLLM2_ROUTER}
    folders = {label: folder for label, folder in shipped.items() if (folder / CONFIG).is_file()}
    root = root or results_folder()
    for pattern in (f"*/*/{METRICS}", f"scratch/*/*/{METRICS}"):
        for metrics in sorted(root.glob(pattern)):
            found = sorted(metrics.parent.glob(f"**/{CONFIG}"))
            for config in sorted(found, key=lambda path: path.parent.name == "best"):
                folder = config.parent
                named = folder.parent if folder.name == "checkpoint" else folder
                folders[str(named.relative_to(root))] = folder
    return folders


def router_for(base: str) -> Path | None:
    """The first of `checkpoints` whose router was made for the base model `base`; None: no one."""
    name = NANO_NAME if base == "nano" else base
    for folder in checkpoints().values():
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if record.get("base", {}).get("name") == name and missing_part(folder) is None:
            return folder
    return None


def label_of(folder: Path) -> str:
    """The label of `checkpoints()`, or the last parts of the path, which name no machine."""
    for label, path in checkpoints().items():
        if path.resolve() == folder.resolve():
            return label
    return "/".join(part for part in folder.parts[-3:] if part not in ("checkpoint", "/"))


def _candidates(folder: Path) -> list[tuple[str, Path]]:
    """(how it is called aloud, folder), best first, in a run's or a variant's folder."""
    def number(path: Path) -> int:
        tail = path.name.rsplit("-", 1)[-1]
        return int(tail) if tail.isdigit() else -1

    named = [(name, folder / name) for name in _MADE]
    named += [("half-written", path) for path in folder.glob(".checkpoint.*.tmp")]
    named += [("last", folder / name) for name in _LAST]
    named += [("last", path) for path in
              sorted(folder.glob("trainer/checkpoint-*"), key=number, reverse=True)]
    return [(said, path) for said, path in named if path.is_dir()]


def _best_in(folder: Path) -> tuple[str, Path] | None:
    """(how it is called aloud, folder) of the best complete checkpoint here or one folder down."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir()
                   and not path.name.startswith(".") and path.name != "trainer")
    inner.sort(key=lambda path: path.name not in ("router", "DLR"))    # before its controls
    named = [pair for place in (folder, *inner) for pair in _candidates(place)]
    named.sort(key=lambda pair: pair[0] == "last")                     # any made before any last
    for said, path in named:
        problem = missing_part(path)
        if problem is None:
            return said, path
        if looks_like(path) or path.name.startswith("."):
            warnings.warn(f"Skipped the half-written checkpoint {str(path)!r}: {problem}.",
                          HalfWritten, stacklevel=3)
    return None


def _shipped(folder: Path, kind: str, place: str) -> Path:
    if not looks_like(folder):
        raise FileNotFoundError(
            f"There is no {kind} router ({place}) in this copy of the "
            "project. Name a checkpoint, for example --set "
            "checkpoint=results/token_routing/quick/DLR, or train one: python -m dlr run. There "
            f"are: {', '.join(checkpoints()) or 'none'}.")
    return folder


def find_checkpoint(where: str | Path | None = None, say=print) -> Path:
    """The checkpoint folder meant by `where`.

    Args:
        where: 'nano-router', 'smollm2-router', a checkpoint's folder, a run's or a variant's, a
            phase, or a label of `checkpoints`. A relative path is looked for from here, then from
            the project's root. None: the embedded router, or the first checkpoint there is.

    Raises:
        FileNotFoundError: there is none; the message says where was looked, and what there is.
    """
    if where is None:
        where = next(iter(checkpoints()), EMBEDDED)
    if str(where) in ("nano-router", EMBEDDED):
        return _shipped(NANO_ROUTER, "embedded", "dlr/nano/router")
    if str(where) in ("smollm2-router", SMOLLM2):
        return _shipped(SMOLLM2_ROUTER, "SmolLM2", "dlr/smollm2")
    folder = from_project(where)
    if not folder.is_dir():
        folder = results_folder() / where
    if not folder.is_dir():
        phases = sorted({label.split("/")[0] for label in checkpoints()}
                        - {EMBEDDED, SMOLLM2})
        raise FileNotFoundError(
            f"There is no checkpoint {str(where)!r}: it is neither a folder nor a phase "
            f"({', '.join(phases) or 'none has a run'}). There are: "
            f"{', '.join(checkpoints()) or 'none'}. python -m dlr run trains one. For a base model "
            "give 'nano', a folder with config.json, or a Hub id with --variant base.")
    if looks_like(folder):
        problem = missing_part(folder)
        if problem:
            raise FileNotFoundError(f"The checkpoint {str(folder)!r} is half-written: {problem}. "
                                    "Give another one, or run its training again.")
        return folder
    if folder.resolve().parent == results_folder().resolve():
        return _newest_of(folder, say)
    best = _best_in(folder)
    if best is None:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no complete checkpoint: looked for {', '.join(_MADE + _LAST)} "
            "and trainer/checkpoint-*, here and one folder down.")
    say(f"checkpoint: {best[0]} of {folder.name}: {best[1]}")
    return best[1]


def _newest_of(phase: Path, say) -> Path:
    """The best checkpoint of the newest complete run of a phase that has one."""
    runs = sorted(phase.glob(f"*/{METRICS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for metrics in runs:
        best = _best_in(metrics.parent)
        if best is not None:
            say(f"checkpoint: {best[0]} of the newest complete run with one, "
                f"{metrics.parent.name}: {best[1]}")
            return best[1]
    raise FileNotFoundError(f"None of the {len(runs)} complete runs of {phase.name!r} holds a "
                            f"checkpoint; train one with 'python -m dlr run {phase.name}'.")
