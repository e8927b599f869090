"""How each run was made: its command, found from what run.json records, and its surroundings."""

import json
import shlex
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from dlr.base.identity import different_settings
from dlr.runs import METRICS, RECORD, project_root
from dlr.settings import SettingsError, read_params, validated
from dlr.workbook.phases import PHASES
from dlr.workbook.report.sources import Missing, Results
from dlr.workbook.report.tables import BLANK, Table
from dlr.workbook.sweeps import expand

PYTHON = "python -m dlr"


@lru_cache
def _known(phase: str) -> list[tuple[str, str, dict]]:
    """(command, name of its run, settings it gives) of a phase: by default, and params files."""
    known = [(f"{PYTHON} run {phase}", "default", {})]
    for path in sorted((project_root() / "params").glob(f"{phase}/*.yaml")):
        given, shown = read_params(path), path.relative_to(project_root()).as_posix()
        if "grid" in given:
            known += [(f"{PYTHON} sweep {shown}", name, point) for name, point in expand(given)]
        else:
            known.append((f"{PYTHON} run {phase} --params {shown}", path.stem, given))
    return known


def _differences(record: dict, given: dict, schema) -> dict:
    """Settings in which a recorded run differs from what a command gives: name to recorded value.
    """
    config = validated({k: v for k, v in given.items() if k != "run_name"}, schema)
    own = {k: v for k, v in record.items() if k in schema.model_fields and k != "run_name"}
    pairs = different_settings(own, config.model_dump(), schema)
    return {name: own[name] for name in pairs if name in own}


def _by_eval(results: Results, run: str) -> str:
    """The command of a run of `python -m dlr eval`, whose settings are no notebook's."""
    metrics = results.read(f"{run}/{METRICS}")
    words = [f"{PYTHON} eval", shlex.quote(str(metrics["rows"][0]["checkpoint"])), "--tasks",
             ",".join(metrics["tasks"])]
    for name in ("num_fewshot", "limit"):
        if metrics.get(name) is not None:
            words.append(f"--{name.replace('_', '-')} {metrics[name]:g}")
    return " ".join(words)


@lru_cache(maxsize=1024)
def command_of(results: Results, run: str) -> tuple[str, list[str]]:
    """(the command that makes a run, settings whose values today are others).

    Args:
        run: '<phase>/<name>'.

    Raises:
        Missing: the run records no settings.
    """
    phase, name = run.split("/")
    record = results.at((f"{run}/{RECORD}", ("settings",)))
    schema = PHASES[phase].schema if phase in PHASES else None
    if schema is None or not record.keys() & schema.model_fields.keys() - {"checkpoint", "skip"}:
        return _by_eval(results, run), []
    choices = []
    for command, usual, given in _known(phase):
        try:
            left = _differences(record, given, schema)
        except SettingsError:
            continue
        choices.append((len(left), usual != name, command, usual, left))
    _, _, command, usual, left = min(choices, key=lambda choice: choice[:2])
    simple = {key: value for key, value in left.items() if not isinstance(value, (list, dict))}
    if " sweep " in command and (left or usual != name):
        command, usual, left = f"{PYTHON} run {phase}", "default", _differences(record, {}, schema)
        simple = left
    for key, value in simple.items():
        text = value if isinstance(value, str) else json.dumps(value)
        command += " --set " + shlex.quote(f"{key}={text}")
    return command + (f" --name {shlex.quote(name)}" if usual != name else ""), \
        sorted(left.keys() - simple.keys())


def making(run: str) -> str:
    """The command that would make a run that is not there."""
    phase, _, name = run.partition("/")
    if phase not in PHASES:
        return f"{PYTHON} run {phase}"
    by_name = {usual: command for command, usual, _ in _known(phase)}
    return by_name.get(name, f"{PYTHON} run {phase}")


# -- tables ---------------------------------------------------------------------------------------
SETTINGS = {"model": "model", "dataset": "text", "seed": "seed", "steps": "steps",
            "batch_size": "sequences a step", "seq_len": "tokens a sequence",
            "eval_docs": "test documents", "skip_adapter_rank": "adapter rank",
            "lora_rank": "LoRA rank", "label_tokens": "labelled tokens"}


def _setting(results: Results, run: str, name: str):
    try:
        number = results.setting(run, name)
    except Missing:
        return BLANK
    return number if number.value not in ("", None) else BLANK


def setup(results: Results, runs: list[str]) -> Table:
    """What each run was told, as its run.json records it."""
    lines = [[Markup("<code>{}</code>").format(run),
              *(_setting(results, run, name) for name in SETTINGS)] for run in runs]
    return Table("setup", "What each run was told; a dash where it has no such setting.",
                 ["run", *SETTINGS.values()], lines, [])


def _machine(results: Results, run: str):
    own = results.at((f"{run}/{RECORD}", ("hardware",)))
    part = "accelerator" if own.get("accelerator") else "processor"
    threads = results.number(f"{run}/{RECORD}", "hardware", "threads")
    return Markup("{}, threads: {}").format(
        results.number(f"{run}/{RECORD}", "hardware", part), threads)


def surroundings(results: Results, runs: list[str]) -> Table:
    """On what each run was made, when, and of which code and data."""
    lines = []
    for run in runs:
        file = f"{run}/{RECORD}"
        versions = [results.number(file, "versions", name)
                    for name in ("python", "torch", "transformers")]
        lines.append([Markup("<code>{}</code>").format(run), _machine(results, run),
                      Markup("<time>{}</time>").format(results.at((file, ("started",)))[:10]),
                      Markup("{} / {} / {}").format(*versions),
                      Markup("<code>{}</code>").format(
                          results.at((file, ("git_commit",)))[:7] or BLANK),
                      Markup("<code>{}</code>").format(
                          results.at((file, ("data_hash",)))[:8] or BLANK),
                      results.metric(run, "seconds", shape=",.0f")])
    columns = ["run", "machine", "begun", "Python / torch / transformers", "commit", "data",
               "seconds"]
    return Table("surroundings", "On what each run was made, and of which code and data (the "
                 "beginnings of their hashes).", columns, lines, [])


def repeating(results: Results, runs: list[str]) -> Table:
    """The command of each run."""
    lines = []
    for run in runs:
        command, others = command_of(results, run)
        note = f"; today other: {', '.join(others)}" if others else ""
        lines.append([Markup("<code>{}</code>").format(run),
                      Markup("<code>{}</code>{}").format(command, note)])
    return Table("commands", "The command that makes each run. Where a setting has another value "
                 "today than it had then, it is named.", ["run", "command"], lines, [])


def recorded(results: Results) -> list[str]:
    """Every finished run that has a run.json, phase by phase."""
    phases = [path.name for path in sorted(Path(results.root).iterdir())
              if path.is_dir() and path.name not in ("scratch", "report")]
    order = {phase: place for place, phase in enumerate(PHASES)}
    phases.sort(key=lambda phase: order.get(phase, len(order)))
    runs = [run for phase in phases for run in results.runs(phase)]
    return [run for run in runs if (results.root / run / RECORD).is_file()]
