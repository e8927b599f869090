"""The phases there are: a notebook each, and the schema of its parameters with their toy values.

A new phase is one file in this folder, beside its notebook and params files:

    @phase("10_idea")
    class IdeaConfig(PhaseSettings):
        toy: ClassVar = {"steps": 2}         # small enough for a test, see `settings.effective`
        steps: int = Field(100, ge=1)
"""

import importlib
from pathlib import Path
from typing import NamedTuple

from dlr.settings import PhaseSettings, Settings, SettingsError, nearest  # noqa: F401


class Phase(NamedTuple):
    """The name of a notebook, and the class of its parameters."""
    notebook: str
    schema: type[Settings]


PHASES: dict[str, Phase] = {}


def phase(notebook: str):
    """Decorates the schema of a notebook: '06_latency' is the notebook of the phase 'latency'."""
    def register(schema: type[Settings]) -> type[Settings]:
        PHASES[notebook.partition("_")[2]] = Phase(notebook, schema)
        in_order = sorted(PHASES.items(), key=lambda entry: entry[1].notebook)
        PHASES.clear()
        PHASES.update(in_order)
        return schema
    return register


def schema_of(phase: str) -> type[Settings]:
    """The settings of a phase. Raises SettingsError: there is no such phase."""
    if phase not in PHASES:
        near = nearest(phase, PHASES)
        hint = f"did you mean {near!r}? " if near else ""
        raise SettingsError(f"unknown phase {phase!r}; {hint}there are: {', '.join(PHASES)}")
    return PHASES[phase].schema


# Every schema registers itself once its file is imported.
for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    importlib.import_module(f"{__package__}.{_file.stem}")
