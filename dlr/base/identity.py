"""What makes two runs the same run: their settings and their data.

A setting that is absent on one side counts as its default, so a new setting orphans no old run. A
value that the machine decides equals any other. Paths are compared by the part that is the same on
every machine, and by what their files hold.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from dlr.base import smollm2
from dlr.base.data import load_documents
from dlr.base.lines import documents_of
from dlr.base.models import NANO, NANO_ROUTER, SMOLLM2_ROUTER
from dlr.runs import (RECORD, Run, from_project, plain, project_root, results_folder, shell_folder,
                      shown_path)
from dlr.settings import LocalPath, MachineDecides, Settings, SettingsError, default_of, items_of

NAMES = ("", "nano", "nano-router", "embedded", smollm2.NAME)      # settings that name no file
_SAMPLE = 1 << 16                                   # bytes read at each place of a large file


# -- paths -----------------------------------------------------------------------
def map_paths(values: dict, schema: type[Settings], change, prefix: str = "") -> dict:
    """`values` with `change(text, mark, name)` of each path-like setting, in rows of lists too."""
    out = dict(values)
    for name, field in schema.model_fields.items():
        value = out.get(name)
        rows = _rows_schema(field.annotation)
        mark = next((m for m in field.metadata if isinstance(m, LocalPath)), None)
        if mark is not None and isinstance(value, str):
            out[name] = change(value, mark, prefix + name)
        elif rows is not None and isinstance(value, list):
            out[name] = [map_paths(row, rows, change, f"{prefix}{name}.{i}.")
                         if isinstance(row, dict) else row for i, row in enumerate(value)]
    return out


def _rows_schema(annotation) -> type[Settings] | None:
    inner = items_of(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, Settings) else None


def resolved(values: dict, schema: type[Settings]) -> dict:
    """`values` with the relative paths of files that are there made absolute (see `from_project`).

    What names no file ('nano', a Hub id) stays as it is. A folder to write to is the caller's.
    """
    def change(text: str, mark: LocalPath, name: str) -> str:
        if text in NAMES:
            return text
        if from_project(text).exists():
            return str(from_project(text).resolve())
        return str((shell_folder() / Path(text).expanduser()).absolute()) if mark.output else text
    return map_paths(values, schema, change)


def _portable(text: str, *_) -> str:
    """A path from the project or the results folder where it lies below, else its last part."""
    path = Path(text)
    if path.is_absolute():
        for root in (project_root(), results_folder()):
            if path.is_relative_to(root) and path != root:
                return path.relative_to(root).as_posix()
        return path.name
    return path.name if text.startswith("..") else text


def portable(settings: dict, schema: type[Settings] | None) -> dict:
    """`settings` without absolute paths; without a schema only their last parts are kept."""
    if schema is not None:
        return map_paths(settings, schema, _portable)
    return {name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
            for name, value in settings.items()}


# -- data -----------------------------------------------------------------------
def digest(path: Path) -> str:
    """Sixteen hex digits of a file, or of the files below a folder.

    Of a run that is its metrics, of a model its weights. A large file is sampled at sixteen places,
    so that a model of many gigabytes takes no longer than a small one.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    metrics = [path / "metrics.json"] if (path / "metrics.json").is_file() else []
    content = hashlib.sha256()
    for file in metrics or weights or files:
        size = file.stat().st_size
        name = file.relative_to(path) if file != path else file.suffix
        content.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= 16 * _SAMPLE:
                content.update(stream.read())
                continue
            for place in range(16):
                stream.seek(place * (size - _SAMPLE) // 15)
                content.update(stream.read(_SAMPLE))
    return content.hexdigest()[:16]


def inputs_of(config: Settings) -> dict[str, str]:
    """Setting to `digest` of every file or folder that `config` reads."""
    embedded = {"nano": NANO / "model.safetensors", "nano-router": NANO_ROUTER,
                "smollm2-router": SMOLLM2_ROUTER}
    digests = {}

    def note(text: str, mark: LocalPath, name: str) -> str:
        path = embedded.get(text) or Path(text)
        if text == smollm2.NAME:
            digests[name] = smollm2.SHA256[:16]
        elif text and text != "embedded" and not mark.output and path.exists():
            digests[name] = digest(path)
        return text
    map_paths(config.model_dump(), type(config), note)
    if getattr(config, "checkpoint", None) == "" and NANO_ROUTER.is_dir():
        digests["checkpoint"] = digest(NANO_ROUTER)
    return digests


@lru_cache(maxsize=8)
def _documents_hash(dataset: str, splits: tuple[str, ...]) -> str:
    return "-".join(load_documents(dataset, split).hash for split in splits)


def data_hash(config: Settings) -> str:
    """Hash of the documents a run of `config` reads; a constant where they are no setting."""
    splits = getattr(config, "splits", None)
    if getattr(config, "lines", 0):
        return "-".join(documents_of(config, split).hash for split in splits)
    return _documents_hash(config.dataset, splits) if splits else getattr(config, "data", "")


# -- comparison -----------------------------------------------------------------------
def _complete(values: dict, schema: type[Settings]) -> dict:
    """`values` with defaults for what is absent, in lists of rows too, as JSON would hold them.

    Settings that the schema has retired are left out.
    """
    fields = schema.model_fields
    out = {name: default_of(schema, name) for name in fields if not fields[name].is_required()}
    out |= {name: value for name, value in values.items() if name not in schema.retired}
    for name, field in fields.items():
        rows = _rows_schema(field.annotation)
        if rows is not None:
            dumped = [row.model_dump() if isinstance(row, Settings) else row for row in out[name]]
            out[name] = [_complete(row, rows) for row in dumped]

    def shortened(text: str, *_) -> str:
        return "/".join(Path(_portable(text)).parts[-3:])
    return json.loads(json.dumps(map_paths(out, schema, shortened)))


def _machine_decided(field, *values) -> bool:
    marked = any(isinstance(mark, MachineDecides) for mark in field.metadata)
    return marked and any(value in (None, "auto") for value in values)


def different_settings(before: dict, now: dict, schema: type[Settings] | None) -> dict[str, tuple]:
    """Name to (before, now) of every setting in which two runs differ; `run_name` is none."""
    old, new = (_complete(values, schema) if schema else values for values in (before, now))
    fields = schema.model_fields if schema else {}
    pairs = {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())}
    return {name: pair for name, pair in pairs.items() if name != "run_name" and pair[0] != pair[1]
            and not (name in fields and _machine_decided(fields[name], *pair))}


def differences(run: Run, settings: dict, data: str, inputs: dict[str, str] | None = None,
                schema: type[Settings] | None = None) -> dict[str, tuple]:
    """What keeps a folder's run from being that of `settings` on this data, as (before, now).

    Args:
        data: hash of the documents, see `data_hash`; '' is any.
        inputs: setting to digest of the files it names, see `inputs_of`.
        schema: the class of `settings`, which knows their defaults; None: all must be equal.
    """
    record = run.record
    if not record and not run.exists:          # its job has begun anew since somebody looked
        return {}
    if "settings" not in record:
        return {RECORD: ("missing or unreadable", "settings to compare with")}
    pairs = different_settings(record["settings"], plain(portable(settings, schema)), schema)
    earlier = record.get("inputs", {})
    inputs = inputs or {}
    for name in earlier.keys() & inputs.keys():        # content decides where both sides know it
        pairs.pop(name, None)
        if earlier[name] != inputs[name]:
            pairs[name] = ("other files", "the ones there now")
    if not pairs and record.get("data_hash") and data and record["data_hash"] != data:
        pairs["data"] = (record["data_hash"], data)
    return pairs


def begin(run: Run, settings: dict, data: str, inputs: dict[str, str] | None = None,
          schema: type[Settings] | None = None) -> Run:
    """Writes run.json, without absolute paths. A run begun with these settings and data goes on.

    Raises:
        SettingsError: the folder holds another run (arguments as in `differences`).
    """
    if run.exists:
        refuse(run, differences(run, settings, data, inputs, schema))
    return run.begin(portable(settings, schema), data, inputs or {})


def refuse(run: Run, pairs: dict[str, tuple]) -> None:
    """Raises SettingsError where `pairs` of `differences` say that the folder holds another run."""
    if pairs:
        raise SettingsError(
            f"{shown_path(run.folder)} holds a run with other settings or data ({said(pairs)}). "
            "Give this one a name of its own (run_name in a notebook, --name on the command line), "
            "or replace that one: --name with --force.")


def said(pairs: dict[str, tuple], most: int = 4) -> str:
    """Differences in words: 'steps: 40, now 400; ...'."""
    parts = [f"{name}: {_short(old)}, now {_short(new)}" for name, (old, new) in pairs.items()]
    unsaid = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {unsaid} more" if unsaid > 0 else "")


def _short(value) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
