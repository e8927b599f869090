"""Numbers that know where they come from: each names its files and places, and how it was made.

A number is written into the page as an element that carries that origin, so that whoever reads the
page can look it up, and a test can make the number anew.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from markupsafe import Markup

from dlr.runs import METRICS, RECORD, project_root

Place = tuple[str, tuple]           # a file, and the steps into it: keys, numbers, {key: value}
PUBLISHED = "dlr/figures/published.json"
ELEMENT = Markup('<data value="{}" data-how="{}" data-shape="{}" data-times="{:g}" data-from="{}" '
                 'title="{}">{}</data>')


class Missing(LookupError):
    """A result that is not there; `run` names the folder below results/ that would hold it."""

    def __init__(self, run: str, what: str):
        super().__init__(f"{run} holds no {what}")
        self.run = run


def _pairs(values: list) -> list[tuple]:
    return list(zip(values[::2], values[1::2]))


# How a number is made of the values it names. Intervals are given as low, high, low, high ...
MADE = {
    "value": lambda values: values[0],
    "mean": lambda values: float(np.mean(values)),
    "SD": lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    "least": min,
    "most": max,
    "count": len,
    "ratio": lambda values: values[0] / values[1],
    "mean ratio": lambda values: float(np.mean([a / b for a, b in _pairs(values)])),
    "gap": lambda values: abs(values[0] - values[1]),
    "widest gap": lambda values: max(abs(a - b) for a, b in _pairs(values)),
    "padded": lambda values: values[0] + (values[1] - values[0]) * values[2],
}


def shaped(value, shape: str, times: float = 1.0) -> str:
    """A value as it is printed: by a format, after a factor, with a true minus sign."""
    if isinstance(value, str) or value is None:
        return "–" if value is None else value
    return format(value * times if times != 1 else value, shape).replace("-", "−")


class Number:
    """A value (or a name) of the results, how it is printed, and what it was made of.

    Attributes:
        value: as it was recorded or computed. shown: as a number again, from what is printed.
    """

    def __init__(self, value, places: list[Place], how: str, shape: str, times: float):
        self.value, self.places, self.how = value, places, how
        self.shape, self.times = shape, times

    def __str__(self) -> str:
        return shaped(self.value, self.shape, self.times)

    @property
    def shown(self) -> float:
        return float(str(self).replace("−", "-").replace(",", ""))

    @cached_property
    def origin(self) -> str:
        """In words: which place of which file."""
        first = f"{self.places[0][0]}: {' / '.join(map(_said, self.places[0][1]))}"
        more = f" and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return first + more + ("" if self.how == "value" else f" ({self.how})")

    def __html__(self) -> str:
        return ELEMENT.format(self.value, self.how, self.shape, self.times,
                              json.dumps(self.places), self.origin, str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def _said(step) -> str:
    if isinstance(step, dict):
        return ", ".join(f"{key} {value}" for key, value in step.items())
    return str(step)


def found(content, steps: Iterable):
    """What lies at the end of `steps`: keys, places in a list, or what the one row there equals.

    Raises:
        LookupError: nothing does, or no row, or more rows than one fit.
    """
    for step in steps:
        if isinstance(step, dict):
            rows = [row for row in content if all(row.get(k) == v for k, v in step.items())]
            if len(rows) != 1:
                raise LookupError(f"{len(rows)} rows with {_said(step)}")
            content = rows[0]
        else:
            content = content[step]
    return content


class Results:
    """The JSON files of a results folder, each read once.

    Args:
        root: the folder that holds <phase>/<run>/metrics.json.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self._files = {}

    def read(self, file: str):
        """A file below the results folder, or of the project where its name begins with 'dlr/'.

        Raises:
            Missing: it is not there.
        """
        if file not in self._files:
            path = (project_root() if file.startswith("dlr/") else self.root) / file
            if not path.is_file():
                raise Missing(str(Path(file).parent), Path(file).name)
            self._files[file] = json.loads(path.read_text(encoding="utf-8"))
        return self._files[file]

    def at(self, place: Place):
        """The value at a place. Raises Missing: there is none."""
        file, steps = place
        try:
            return found(self.read(file), steps)
        except (LookupError, TypeError) as error:
            if isinstance(error, Missing):
                raise
            raise Missing(str(Path(file).parent), " / ".join(map(_said, steps))) from error

    def made(self, how: str, places: list[Place], shape: str = "", times: float = 1.0) -> Number:
        """A number made of several values. Raises Missing: one is not there, or there are none."""
        if not places:
            raise Missing("results", f"values for the {how}")
        values = [self.at(place) for place in places]
        if any(value is None for value in values) and how not in ("value", "count"):
            raise Missing(str(Path(places[0][0]).parent), "known value for one of its numbers")
        return Number(MADE[how](values), places, how, shape, times)

    def number(self, file: str, *steps, shape: str = "", times: float = 1.0) -> Number:
        """One recorded value."""
        return self.made("value", [(file, steps)], shape, times)

    def metric(self, run: str, *steps, shape: str = ".2f", times: float = 1.0) -> Number:
        """One value of a run's metrics.json; `run` is '<phase>/<name>'."""
        return self.number(f"{run}/{METRICS}", *steps, shape=shape, times=times)

    def percent(self, run: str, *steps, shape: str = ".1f") -> Number:
        """A share of a run's metrics.json, in per cent."""
        return self.metric(run, *steps, shape=shape, times=100)

    def setting(self, run: str, name: str, shape: str = "", times: float = 1.0) -> Number:
        """A setting that run.json records. Numbers are printed with commas."""
        number = self.number(f"{run}/{RECORD}", "settings", name, shape=shape, times=times)
        if not shape and isinstance(number.value, int) and not isinstance(number.value, bool):
            number.shape = ","
        return number

    def published(self, *steps, shape: str = "", times: float = 1.0) -> Number:
        """One of the predecessor's published numbers."""
        return self.number(PUBLISHED, *steps, shape=shape, times=times)

    def rows(self, run: str, key: str = "rows") -> list[dict]:
        """A list of a run's metrics.json. Raises Missing: there is none, or it is empty."""
        rows = self.at((f"{run}/{METRICS}", (key,)))
        if not rows:
            raise Missing(run, key)
        return rows if isinstance(rows, list) else [rows]

    def runs(self, phase: str, beginning: str = "") -> list[str]:
        """'<phase>/<name>' of every finished run of a phase, by name."""
        paths = sorted((self.root / phase).glob(f"*/{METRICS}"))
        return [f"{phase}/{path.parent.name}" for path in paths
                if path.parent.name.startswith(beginning)]
