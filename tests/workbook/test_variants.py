"""What `dlr train` trains is what the notebook of the phase looks for; and what the command refuses."""

import json

import pytest
from tiny_models import base_and_texts

from dlr.__main__ import main
from dlr.base.identity import different_settings
from dlr.runs import Run
from dlr.train.trainer import DLRTrainer
from dlr.workbook import notebooks
from dlr.workbook.phases import PHASES
from dlr.workbook.phases.training import ParetoConfig

DEPTH = {"router_class": "DepthRouter", "router_hidden": 8, "skip_adapter_rank": 2, "adapter_tokens": 64, "order_tokens": 64,
         "label_tokens": 64, "visits": 512, "candidates": 2}
RUNS = [("baselines", {"dropped": [0.4]}, 2), ("sequence_routing", {"penalties": [1.0]}, 2),
        ("token_routing", DEPTH | {"variants": ["DLR", "best static", "ShortGPT", "dense LoRA"]}, 4),
        ("pareto", DEPTH | {"point": "router", "budgets": [0.4]}, 2),
        ("pareto", DEPTH | {"point": "baselines", "budgets": [0.4]}, 2),
        ("stages", DEPTH | {"budgets": [0.4], "context_tokens": 64}, 2)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return base_and_texts(tmp_path_factory.mktemp("variants")) | {"always_keep": 2}


def run_notebook(phase: str, parameters: dict, run: Run) -> None:
    """The notebook's own cells, in this process, until the run is done; what it draws has tests of its own."""
    names = {}
    for cell in notebooks.read_pair(PHASES[phase].notebook).cells:
        if cell.cell_type == "code" and not run.done:
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters


@pytest.mark.parametrize("phase, settings, variants", RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_notebook_finds_every_variant_that_was_trained(phase, settings, variants, small, tmp_path, monkeypatch, capsys):
    for name, value in (("DLR_PRESET", "toy"), ("DLR_RESULTS", str(tmp_path)), ("DLR_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dlr.measure.evaluate.BOOTSTRAP", 10)              # intervals are not what is looked at
    params = tmp_path / phase / "mine.yaml"
    params.parent.mkdir()
    params.write_text(json.dumps(small | settings))
    assert main(["train", "--params", str(params)]) == 0                   # its folder names the phase
    said = capsys.readouterr().out
    assert f"{variants} variants" in said and f"python -m dlr run {phase} --params {params} --name mine" in said
    run = Run(tmp_path / phase / "mine")
    assert not run.done and len(list(run.folder.glob("*/trainer/checkpoint-2"))) == variants
    def refuse(*_, **__):
        raise AssertionError("trained again")
    monkeypatch.setattr(DLRTrainer, "train", refuse)
    run_notebook(phase, small | settings | {"run_name": "mine"}, run)
    assert run.done and main(["train", "--params", str(params)]) == 0
    assert "finished before" in capsys.readouterr().out


def test_a_sharded_training_is_the_same_run():
    assert not different_settings(ParetoConfig(shard=True).model_dump(), ParetoConfig().model_dump(), ParetoConfig)


@pytest.mark.parametrize("arguments, words", [
    (["train", "latency"], "'latency' is a phase that trains nothing here; say which of baselines"),
    (["train"], "is no phase; say which of baselines"),
    (["train", "pareto"], "point='summary' trains nothing: set point=router"),
    (["train", "pareto", "--set", "point=router", "--set", "shard=true", "--set", "load_in_4bit=true"], "leave shard out"),
    (["train", "token_routing", "--set", "target_skp=0.3"], "did you mean 'target_skip'")])
def test_what_it_refuses_is_one_sentence_and_no_folder(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "r"))
    assert main(arguments) == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))
