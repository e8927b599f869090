"""What a notebook's first cells need, and the tables that put runs together."""

import ast
import re
from pathlib import Path

import pandas as pd

from dlr.base.identity import different_settings, resolved
from dlr.runs import finished_runs, kind_of
from dlr.settings import (Settings, SettingsError, effective, from_text, nearest, read_params,
                          validated)
from dlr.workbook.phases import PHASES, schema_of
from dlr.workbook.places import open_run

__all__ = ["checked_parameters", "notebook_settings", "open_run", "results_table", "seeds_table"]

COLUMNS = ["variant", "skip", "active_layers", "perplexity", "perplexity_low", "perplexity_high"]
INJECTED = "# Parameters"          # opens the cell that papermill puts after the parameters cell


# -- a notebook's settings -----------------------------------------------------------------------
def notebook_settings(phase: str, names: dict) -> Settings:
    """Validated settings from a notebook's globals, to be called in the cell after its parameters.

    Relative paths are looked for in the kernel's folder and in the project.

    Raises:
        SettingsError: a value is wrong, or a name is no setting; the message names the nearest.
    """
    schema = schema_of(phase)
    stray = stray_names(names, schema)
    if stray:
        refusals = []
        for name in stray:
            near = nearest(name, schema.model_fields)
            hint = f", did you mean {near!r}?" if near else ""
            refusals.append(f"unknown setting {name!r}{hint}")
        raise SettingsError(f"{'; '.join(refusals)} A name that is none is let be once it is gone: "
                            f"del {stray[0]}")
    given = {name: value for name, value in names.items() if name in schema.model_fields}
    return effective(resolved(given, schema), schema)


def _assigned(source: str) -> dict[str, tuple[bool, bool]]:
    """Names that a cell assigns at its top level: (with a type beside it, a literal) each."""
    lines = source.splitlines()
    code = "\n".join("pass" if re.match(r"\s*[%!?]", line) else line for line in lines)
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError):
        return {}
    assigned = {}
    for node in body:
        is_typed = isinstance(node, ast.AnnAssign)
        if is_typed or isinstance(node, ast.Assign):
            for target in [node.target] if is_typed else node.targets:
                if isinstance(target, ast.Name):
                    assigned[target.id] = is_typed, _is_literal(node.value)
    return assigned


def _is_literal(node) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def stray_names(names: dict, schema: type[Settings]) -> list[str]:
    """Names someone meant as settings although there are no such ones.

    IPython keeps the source of every cell that was run (`In`). Every name is meant as a setting
    that the parameters cell assigns, which is the newest one with a setting and its type, or the
    cell papermill puts behind it. Elsewhere a name is if it holds a literal, is nearly a setting's,
    and was assigned after that setting was: correcting it helps. Without `In` (no notebook) every
    name that is nearly a setting's counts.
    """
    fields = schema.model_fields
    plain_types = (bool, int, float, str, list, dict, type(None))
    given = [name for name, value in names.items() if type(value) in plain_types
             and name not in fields and not name.startswith("_")]
    if not isinstance(names.get("In"), list):
        return [name for name in given if nearest(name, fields, 0.8)]
    cells = [_assigned(source) for source in names["In"]]
    typed = [any(name in fields and is_typed for name, (is_typed, _) in cell.items())
             for cell in cells]
    current = max((place for place, is_typed in enumerate(typed) if is_typed), default=-1)
    injected = [place for place, source in enumerate(names["In"])
                if source.lstrip().startswith(INJECTED) and place > current]
    newest = {name: place for place, cell in enumerate(cells) for name in cell}

    def meant(name: str) -> bool:
        place, near = newest.get(name), nearest(name, fields, 0.8)
        if place is None or place == current or place in injected[-1:]:
            return place is not None
        is_literal = cells[place][name][1]
        return bool(near) and not typed[place] and is_literal and place >= newest.get(near, -1)
    return [name for name in given if meant(name)]


def checked_parameters(phase: str, params_file: str | None, assignments: list[str]) -> dict:
    """Parameters from a YAML file and `name=value` pairs, with paths made absolute.

    Raises:
        SettingsError: they are wrong, which is said before a kernel starts.
    """
    schema = schema_of(phase)
    given = read_params(params_file) if params_file else {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise SettingsError(f"--set {assignment!r} must read name=value, for example "
                                "--set target_skip=0.3")
        given[name.strip()] = from_text(name.strip(), value, schema)
    given = resolved(given, schema)
    effective(given, schema)
    return given


def name_of(phase: str, arguments, parameters: dict) -> tuple[str, bool]:
    """(the name of a command's run, whether it was given: by --name or --set run_name=).

    Raises:
        SettingsError: it is no folder's name.
    """
    assigned = {name.strip(): value
                for name, _, value in (text.partition("=") for text in arguments.set)}
    given = arguments.name or assigned.get("run_name")
    usual = Path(arguments.params).stem if arguments.params else "default"
    name = given or parameters.get("run_name") or usual
    validated({"run_name": name}, schema_of(phase))
    return name, bool(given)


def effective_of(phase: str, given: dict, notebook=None) -> Settings:
    """The settings a phase's notebook will have once `given` is put behind its parameters cell."""
    from dlr.workbook.notebooks import cell_defaults, read_pair  # late: its libraries take a second
    notebook = notebook or read_pair(PHASES[phase].notebook, say=lambda text: None)
    return effective(cell_defaults(notebook) | given, schema_of(phase))


# -- tables over runs -----------------------------------------------------------------------
def shown(rows: list[dict]) -> pd.DataFrame:
    """What people read of rows of `dlr.workbook.study`."""
    return pd.DataFrame(rows)[COLUMNS].round(3)


# In what the runs of one table may differ: by intent, or (bf16) by the machine.
_OF_A_POINT = ("seed", "target_skip", "point", "dropped", "run_name", "bf16")


def results_table(phase: str, root=None, names=None) -> pd.DataFrame:
    """Every row of a phase's finished runs (of those in `names`, if given), with the run's name.

    A column `settings` says in what runs differ beside seed, target and part of the sweep.
    """
    runs = {name: run for name, run in finished_runs(phase, root).items()
            if names is None or name in names}
    settings = {name: run["run"].get("settings", {}) for name, run in runs.items()}
    schema = PHASES[phase].schema if phase in PHASES else None
    first = next(iter(settings.values()), {})
    vary = sorted({key for values in settings.values()
                   for key in different_settings(first, values, schema)} - set(_OF_A_POINT))
    rows = []
    for name, run in runs.items():
        label = ", ".join(f"{key}={settings[name].get(key)}" for key in vary)
        note = {"settings": label} if vary else {}
        rows += [{"run": name, **note, **row} for row in run["metrics"]["rows"]]
    return pd.DataFrame(rows)


def seeds_table(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of skip and perplexity, one row a target and variant.

    Rows at full depth and of stochastic depth have no target: '-'. Settings are never mixed.
    """
    if table.empty:
        return pd.DataFrame(columns=["variant", "target_skip", "runs", "skip", "perplexity"])
    untargeted = [kind_of(row) in ("base", "dense", "stochastic")
                  for row in table.to_dict("records")]
    targets = table["target_skip"].astype(object).mask(pd.Series(untargeted, table.index), "-")
    by = ["variant", "target_skip", *(["settings"] if "settings" in table else [])]
    means = table.assign(target_skip=targets).groupby(by, sort=False).agg(
        runs=("perplexity", "size"), skip=("skip", "mean"), skip_sd=("skip", "std"),
        perplexity=("perplexity", "mean"), perplexity_sd=("perplexity", "std")).reset_index()
    digits = {"skip": 4, "skip_sd": 4, "perplexity": 2, "perplexity_sd": 2}
    return means.sort_values(["skip", "perplexity"]).round(digits)


def comparable(table: pd.DataFrame, say=print) -> pd.DataFrame:
    """The largest set of rows whose runs share their settings; says how many runs are left out."""
    if "settings" not in table:
        return table
    most = table.groupby("settings")["run"].nunique().idxmax()
    others = table[table["settings"] != most]
    count, every = others["run"].nunique(), table["run"].nunique()
    settings = "; ".join(others["settings"].unique())
    say(f"Left out for their other settings: {count} of {every} runs ({settings}).")
    return table[table["settings"] == most]
