"""Settings from people: of notebook cells, YAML files and `--set`, validated or refused."""

import difflib
import os
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")          # YAML 1.1 reads 1e-4 as text


class SettingsError(ValueError):
    """A setting that is unknown, mistyped or out of range; the message names it and the remedy."""


class LocalPath:
    """Marks a setting that may name a file or folder; one that is written to need not exist."""

    def __init__(self, output: bool = False):
        self.output = output


class MachineDecides:
    """Marks a setting that None or 'auto' leaves to the machine: it then equals any other value."""


Local = Annotated[str, LocalPath()]
Named = Annotated[Local, Field(min_length=1)]           # '' would be the current folder
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]            # what every library's generator takes
Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """What all settings share: no unknown names, no conversions, finite numbers, checked copies."""
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    toy: ClassVar[dict[str, Any]] = {}      # what DLR_PRESET=toy puts in place of defaults
    retired: ClassVar[tuple[str, ...]] = ()     # of older records, where they say nothing now

    def changed(self, **changes):
        """A copy with other values, validated as a whole; pydantic's `model_copy` checks nothing.

        Raises:
            SettingsError: an unknown name, a wrong value, or values that do not go together.
        """
        return validated(self.model_dump() | changes, type(self))


def checked_name(name: str) -> str:
    """`name` if it can be a folder's name.

    Raises:
        ValueError: it is a path, begins with a dot, or holds signs that trouble file systems.
    """
    if not re.fullmatch(r"[\w=+-][\w.=+-]*", name) or len(name.encode()) > 150:
        raise ValueError("it names a folder: letters, digits and _ . = + - only, no dot at the "
                         "start, up to 150 bytes")
    return name


RunName = Annotated[str, AfterValidator(lambda name: name and checked_name(name))]


class PhaseSettings(Settings):
    """What every notebook is told."""
    run_name: RunName = ""             # folder below results/<phase>/; '': exploratory


def distinct(shown="{}"):
    """Refuses a list in which two values read the same as `shown`, as folders are named."""
    def check(values: list) -> list:
        names = [shown.format(value) for value in values]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"it holds one value twice ({twice})")
        return values
    return AfterValidator(check)


# -- what a field takes -----------------------------------------------------------------------
def _parts(annotation) -> tuple:
    """The alternatives of an annotation, without None."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for alternative in get_args(annotation) for part in _parts(alternative)
                     if part is not type(None))
    return (annotation,)


def _is_text(annotation) -> bool:
    def is_text(part) -> bool:
        values = get_args(part) if get_origin(part) is Literal else ()
        return part is str or bool(values) and all(isinstance(value, str) for value in values)
    return all(map(is_text, _parts(annotation)))


def items_of(annotation):
    """The annotation of a list's items, or None."""
    lists = [part for part in _parts(annotation) if get_origin(part) is list]
    return get_args(lists[0])[0] if lists else None


def _numbers(value, annotation):
    """`value` with texts like '1e-4' as numbers, where the field takes numbers."""
    if isinstance(value, str) and float in _parts(annotation):
        return float(value) if _EXPONENT.fullmatch(value.strip()) else value
    if isinstance(value, list) and items_of(annotation) is not None:
        return [_numbers(item, items_of(annotation)) for item in value]
    return value


class _Yaml(yaml.SafeLoader):
    """YAML whose numbers are decimal, and in which None is null.

    Version 1.1 reads 010 as 8, 10:00 as 600 and 1e-4 as text.
    """
    yaml_implicit_resolvers = {
        first: [pair for pair in resolvers if not pair[0].endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def _resolve(tag: str, pattern: str, firsts: str, make) -> None:
    """Plain texts that begin with one of `firsts` and fit `pattern` are read by `make`."""
    _Yaml.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), list(firsts))
    _Yaml.add_constructor(tag, lambda loader, node: make(loader.construct_scalar(node)))


_resolve("!null", "None", "N", lambda text: None)
_resolve("!int", r"[-+]?[0-9][0-9_]*", "-+0123456789", int)
_resolve("!float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789",
         float)


def from_text(name: str, text: str, schema: type[Settings]):
    """The value of setting `name` written as `text`: as it is for a text, else read as YAML.

    Raises:
        SettingsError: it is not valid YAML.
    """
    annotation = schema.model_fields[name].annotation if name in schema.model_fields else str
    if type(None) in get_args(annotation) and text in ("null", "None", "~"):
        return None
    if _is_text(annotation):
        return text             # an unknown name is refused by `validated`, which knows the nearest
    items = items_of(annotation)
    loader = yaml.BaseLoader if items is not None and _is_text(items) else _Yaml
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = "a list such as [a, b]" if items is not None else "one value"
        raise SettingsError(f"{name}={text!r} cannot be read ({_problem(error)}); "
                            f"write {what}.") from None


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


# -- refusals -----------------------------------------------------------------------
def nearest(name: str, known, cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _hint(error: dict) -> str:
    value = error["input"]
    if error["type"] == "list_type":
        return " (write [a, b])"
    if error["type"] == "string_type" and value is not None and not isinstance(value, (list, dict)):
        return f" (YAML reads it as {type(value).__name__}: put it in quotes)"
    return ""


def _explain(error: dict, schema: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = nearest(name, schema.model_fields) if len(error["loc"]) == 1 else None
        return f"unknown setting {name!r}" + (f"; did you mean {near!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    shown = repr(error["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{name}={shown}: {message[0].lower()}{message[1:]}{_hint(error)}"


def validated(given: dict[str, Any], schema: type[BaseModel]) -> BaseModel:
    """`schema(**given)`, or a SettingsError with one sentence a problem."""
    fields = schema.model_fields
    given = {k: _numbers(v, fields[k].annotation) if k in fields else v for k, v in given.items()}
    try:
        return schema.model_validate(given)
    except ValidationError as errors:
        raise SettingsError("; ".join(_explain(e, schema) for e in errors.errors())) from None


def default_of(schema: type[BaseModel], name: str):
    """The value field `name` has when nobody gives one."""
    return schema.model_fields[name].get_default(call_default_factory=True)


def effective(given: dict[str, Any], schema: type[Settings]) -> Settings:
    """Validated settings, on the toy preset where the environment asks for it (`DLR_PRESET=toy`).

    The preset replaces defaults. A value someone chose counts, numbers up to four times as large.
    """
    preset = os.environ.get("DLR_PRESET", "")
    if preset not in ("", "toy"):
        raise SettingsError(f"DLR_PRESET={preset!r} is no preset; there is 'toy', for tests.")
    config = validated(given, schema)
    if preset == "toy":
        small = {name: _toy(getattr(config, name), default_of(schema, name), value)
                 for name, value in schema.toy.items()}
        config = config.changed(**small)
    return config


def _toy(value, default, small):
    if value is None or value == default:
        return small
    is_number = isinstance(small, (int, float)) and not isinstance(small, bool)
    return min(value, 4 * small) if is_number else value


def read_params(path: str | Path, _read_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML params file (differences from the defaults only).

    `like: FILE` begins with what another file holds, beside this one or by a path from here, and
    `like: [FILE, FILE]` with what several do, the last of which counts; in a sweep file that goes
    into `common`. What this file says itself comes after it.

    Raises:
        FileNotFoundError, SettingsError: no such file (the neighbours are named), not a mapping, or
            files that are like one another.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        neighbours = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"No params file {str(path)!r}."
                                + (f" There are: {neighbours}." if neighbours else ""))
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{str(path)!r} is not valid YAML: {_problem(error)}") from None
    if not isinstance(loaded or {}, dict):
        raise SettingsError(f"{str(path)!r} must hold 'name: value' lines, not a "
                            f"{type(loaded).__name__}.")
    params = {str(name): value for name, value in (loaded or {}).items()}
    return _with_shared(params, path, _read_by) if "like" in params else params


def _with_shared(params: dict[str, Any], path: Path, read_by: tuple[Path, ...]) -> dict[str, Any]:
    """`params` of the file `path`, behind what the file holds that they are `like`."""
    like = params.pop("like")
    names = [like] if isinstance(like, str) else like
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise SettingsError(f"{str(path)!r} says like={like!r}; give a file or a list of files, as "
                            "in like: ../models/tinyllama.yaml")
    read_by = (*read_by, path.resolve())
    shared: dict[str, Any] = {}
    for name in names:
        other = path.parent / name
        if other.resolve() in read_by:
            raise SettingsError(f"{str(path)!r} is like {name!r}, which is like it in turn. Take "
                                "one of the two lines out.")
        shared |= read_params(other, read_by)
    if "grid" not in params:
        return shared | params
    return params | {"common": shared | (params.get("common") or {})}
