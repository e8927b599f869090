"""A checkpoint's folder: its own files, written whole beside others, and what may be wrong.

The record (router_config.json or control.json) is written last and names the checkpoint's files
with their digests, so that a save that was killed, or files of two saves in one folder, are refused
instead of being loaded as one.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dlr.runs import temporary

WEIGHTS, CONFIG = "router.safetensors", "router_config.json"
CONTROL = "control.json"            # a static, stochastic or dense checkpoint: see dlr.base.opened
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECORDS, PARTS = (CONFIG, CONTROL), (WEIGHTS, ADAPTER, ADAPTER_CONFIG)


def digests(folder: Path) -> dict[str, str]:
    """Name to sixteen hex digits of each of a checkpoint's own files; the record is left out."""
    return {name: hashlib.sha256(_content(folder / name)).hexdigest()[:16]
            for name in PARTS if (folder / name).is_file()}


def digest_of(folder: Path, *how) -> str:
    """Sixteen hex digits of a checkpoint's files as they are, and of `how` it is run."""
    digest = hashlib.sha256(repr(how).encode())
    for path in sorted(folder.glob("*")):
        if path.name in (*PARTS, *RECORDS):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    with contextlib.suppress(ValueError):       # whatever a checkout did to line ends and spaces
        content = json.dumps(json.loads(content), sort_keys=True).encode()
    return content


def as_json(record: dict) -> str:
    """`record` as standard JSON.

    Raises:
        ValueError: it holds an infinity or NaN, which JSON has no word for.
    """
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except ValueError:
        odd = [name for name, value in record.items()
               if isinstance(value, float) and not math.isfinite(value)]
        raise ValueError(f"A checkpoint cannot hold an infinite or undefined number, as "
                         f"{', '.join(odd) or 'a list'} is here; set a finite one (calibrate the "
                         "router) before saving.") from None


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A temporary folder whose files go into `folder`, beside others, when the block ends well.

    Nothing changes while the block runs. Then the old record goes, the parts come, and the new
    record comes last.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{str(folder)!r} is a file; a checkpoint is a folder. Give "
                                 "another name.")
    folder = folder.resolve()
    new = temporary(folder)
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _publish(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _publish(staged: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(staged, folder)
        return
    stale = set()
    for record in RECORDS:
        if (folder / record).exists():
            stale |= set(files_of(_read(folder / record)) or PARTS) & set(PARTS)
            (folder / record).unlink()
    for name in stale - {path.name for path in staged.iterdir()}:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name in RECORDS):
        os.replace(path, folder / path.name)


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def files_of(record: dict) -> dict[str, str]:
    """The files a record names, with their digests; {} in records of an earlier form."""
    files = record.get("files")
    return files if isinstance(files, dict) else {}


def has_adapter(folder: Path, record: dict) -> bool:
    """Whether an adapter belongs to the checkpoint: one may lie there from something else."""
    files = files_of(record)
    return ADAPTER in files if files else (folder / ADAPTER_CONFIG).exists()


def _unreadable(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError
        else:
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{path.name} {'is missing' if missing else 'cannot be read'}"
    return None


def looks_like(folder: Path) -> bool:
    """Whether `folder` holds any part of a DLR checkpoint."""
    return any((folder / name).exists() for name in (*RECORDS, WEIGHTS, ADAPTER_CONFIG))


def missing_part(folder: Path) -> str | None:
    """What makes `folder` an incomplete checkpoint, or None."""
    if folder.name.startswith(".") and folder.suffix == ".tmp":
        return "it was being written"
    control = (folder / CONTROL).exists()
    record = _read(folder / (CONTROL if control else CONFIG))
    files = files_of(record)
    parts = [CONTROL] if control else [CONFIG, WEIGHTS]
    if files:
        parts += [name for name in files if name in PARTS]
    elif control or (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER).exists():
        parts += [ADAPTER_CONFIG, ADAPTER]
    if folder.parent.name == "trainer":
        parts.append("trainer_state.json")
    problem = next((problem for part in parts if (problem := _unreadable(folder / part))), None)
    if problem is None and files:
        now = digests(folder)
        problem = next((f"{name} is not the file that was saved with it" for name in files
                        if name in PARTS and now.get(name) != files[name]), None)
    return problem


def refuse_incomplete(folder: Path) -> dict:
    """The record in `folder`, once all its parts are there and are those that were saved together.

    Raises:
        FileNotFoundError: it is no checkpoint, or half of one; ValueError: its adapter is a pickle.
    """
    control = (folder / CONTROL).is_file()
    if not control and not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise FileNotFoundError(f"{str(folder)!r} is no DLR checkpoint: it needs {CONFIG} and "
                                f"{WEIGHTS}.")
    record = _read(folder / (CONTROL if control else CONFIG))
    pickled = (folder / "adapter_model.bin").exists() and not (folder / ADAPTER).exists()
    if pickled and has_adapter(folder, record):
        raise ValueError(f"The adapter in {str(folder)!r} is a pickle (adapter_model.bin); loading "
                         "one runs whatever code it holds, so it is refused. Save the adapter "
                         f"as {ADAPTER}.")
    problem = missing_part(folder)
    if problem:
        raise FileNotFoundError(f"The checkpoint {str(folder)!r} is half-written: {problem}. Give "
                                "another one, or save it again.")
    return record
