"""The table of parameter files: every script of the first studies has a command, and every command is valid."""

import re
import shlex

import pytest
import yaml

from dlr.__main__ import parser
from dlr.runs import project_root
from dlr.settings import read_params
from dlr.workbook.phases import PHASES
from dlr.workbook.runner import checked_parameters
from dlr.workbook.sweeps import expand, points_of

PARAMS = project_root() / "params"
MODELS = ("tinyllama", "qwen2.5-3b-4bit", "openllama-3b", "qwen2.5-7b", "llama3.1-8b")
FIRST, BEYOND = (re.findall(r"(?m)^\| ([\w, ]+) \|.* `(python [^`]+)` \|$", part) for part in
                 (PARAMS / "README.md").read_text(encoding="utf-8").split("## Beyond them"))
COMMANDS = list(dict.fromkeys(command.replace("MODEL", model) for _, command in FIRST + BEYOND for model in MODELS))


@pytest.fixture(autouse=True)
def _at_the_project(monkeypatch):
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.chdir(project_root())


def test_every_script_of_the_first_studies_has_a_row():
    numbers = [*range(1, 3), 4, *range(6, 20), *range(22, 30)]
    more = {"exp8_fast", "exp8_turbo", "exp9_ablation_no_kd", "plot_results", "manuscript_draft"}
    named = [name for scripts, _ in FIRST for name in scripts.split(", ")]
    assert len(FIRST) == 29 and len(named) == len(set(named))
    assert set(named) == {f"exp{number}" for number in numbers} | more


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_table_parses_and_its_settings_are_valid(command):
    python, _, module, *words = shlex.split(command)
    if module == "dlr.figures":
        assert not words
        return
    arguments = parser().parse_args(words)
    if arguments.command == "sweep":
        assert points_of(arguments.file, arguments.name, arguments.set)[1]
    elif arguments.command != "report":
        (phase,) = arguments.phases
        assert checked_parameters(phase, arguments.params, arguments.set)


def test_every_model_is_its_own_base_everywhere():
    """A file named for a model is like it: name, revision, precision; what it says itself comes on top."""
    for model in MODELS:
        shared = read_params(PARAMS / "models" / f"{model}.yaml")
        assert shared["model"] and read_params(PARAMS / "models" / f"{model}-training.yaml").items() >= shared.items()
        found = set()
        for path in PARAMS.glob(f"*/{model}*.yaml"):
            params, phase = read_params(path), path.parent.name
            points = [point for _, point in expand(params)] if "grid" in params else [params]
            if phase not in ("models", "latency", "token_analysis"):   # these read a shape, and a checkpoint's record
                assert all(point.items() >= shared.items() for point in points), path
            found.add(phase)
        assert found >= {"baselines", "sequence_routing", "token_routing", "pareto", "evaluation", "token_analysis"}, model
        assert (PARAMS / "latency" / f"{model.removesuffix('-4bit')}.yaml").is_file()


def test_the_analysis_reads_the_router_that_the_models_sweep_trains():
    for model in MODELS:
        checkpoint = read_params(PARAMS / "token_analysis" / f"{model}.yaml")["checkpoint"]
        points = dict(expand(read_params(PARAMS / "pareto" / f"{model}.yaml")))
        assert points[checkpoint.removeprefix("pareto/")]["point"] == "router"


def test_a_shared_file_is_used():
    texts = [path.read_text(encoding="utf-8") for path in PARAMS.glob("*/*.yaml")]
    like = {name for text in texts for names in [(yaml.safe_load(text) or {}).get("like", [])]
            for name in ([names] if isinstance(names, str) else names)}
    for path in (PARAMS / "models").glob("*.yaml"):
        assert {path.name, f"../models/{path.name}"} & like, path
    assert {path.name for path in PARAMS.iterdir() if path.is_dir()} <= {"models", *PHASES}
