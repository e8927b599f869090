"""A run that is asked to end, one that goes on, and one that is begun anew."""

import json
import os
import subprocess
import sys
import time

import pytest
from tiny_models import base_and_texts

from dlr.runs import Run, project_root
from dlr.settings import SettingsError
from dlr.train.resume import newest, steps_of
from dlr.train.stopping import EXIT
from dlr.workbook import notebooks, phase_run, traincommand
from dlr.workbook.phases.training import TokenConfig
from dlr.workbook.places import Wanted, open_run

LEFT = ("DLR/trainer/checkpoint-1/trainer_state.json", "DLR/log.csv", "DLR/best/router_config.json")


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Begins a run as a kill leaves it; what a notebook then finds in its folder is noted."""
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    monkeypatch.setattr("dlr.base.identity.data_hash", lambda config: "data")
    seen = []

    def execute(notebook, target, parameters):
        seen.append([name for name in LEFT if (target.parent / name).is_file()])
    monkeypatch.setattr(notebooks, "execute", execute)

    def begin(**settings):
        run = Wanted("token_routing", TokenConfig(**settings)).start(Run(tmp_path / "token_routing" / "mine"))
        for name in LEFT:
            (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / name).write_text("{}")
        return run
    return begin, seen


def again(**options):
    """The same command once more, with --force or --fresh."""
    phase_run.run_phase("token_routing", {}, "mine", True, **{"force": False} | options)


def test_the_same_command_goes_on_and_fresh_and_force_begin_anew(begun):
    begin, seen = begun
    for options, found in (({}, list(LEFT)), ({"fresh": True}, []), ({"force": True}, [])):
        begin()
        again(**options)
        assert seen.pop() == found, options


def test_only_force_replaces_what_is_finished_or_has_other_settings(begun, capsys):
    """And it then goes on from no state of those settings."""
    begin, seen = begun
    begin().finish([])
    again(fresh=True)
    assert not seen and "finished before" in capsys.readouterr().out
    begin().folder.joinpath("metrics.json").unlink()
    run = begin()
    record = run.record
    record["settings"]["steps"] = 7
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SettingsError, match="steps: 7, now 40"):
        again(fresh=True)
    again(force=True)
    assert seen == [[]]


def test_fresh_begins_anew_in_a_notebook_and_in_several_processes(begun, capsys):
    begin, _ = begun
    run, config = begin(), TokenConfig(run_name="mine")
    open_run("token_routing", config)
    assert all((run.folder / name).is_file() for name in LEFT) and "open_run(..., fresh=True)" in capsys.readouterr().out
    open_run("token_routing", config, fresh=True)
    assert [path.name for path in run.folder.rglob("*") if path.is_file()] == ["run.json"]
    begin()
    traincommand._started(Wanted("token_routing", config), "mine", True, fresh=True)
    assert [path.name for path in run.folder.rglob("*") if path.is_file()] == ["run.json"]
    begin().finish([])
    assert open_run("token_routing", config, fresh=True).done


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_waits_for_its_kernel_to_save(tmp_path):
    """SIGTERM to the command alone; its notebook trains in a process of its own."""
    settings = base_and_texts(tmp_path) | {"steps": 2000, "save_steps": 2000, "bf16": False, "seq_len": 16, "eval_len": 16,
                                           "batch_size": 2, "lora_rank": 2, "eval_steps": 0, "eval_docs": 2}
    (tmp_path / "point.yaml").write_text(json.dumps(settings))
    process = subprocess.Popen([sys.executable, "-m", "dlr", "run", "baselines", "--params", str(tmp_path / "point.yaml")],
                               cwd=project_root(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"DLR_RESULTS": str(tmp_path / "r"), "DLR_PRESET": ""})
    variant = tmp_path / "r" / "baselines" / "point" / "dense"
    deadline = time.time() + 120
    while not (variant / "log.csv").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT, said[-3000:]
    steps = steps_of(newest(variant / "trainer", 1))
    assert said.strip().splitlines()[-1] == \
        f"stopped as asked: step {steps} of 2000 is saved; the same command goes on from there"
    assert 1 <= steps < 2000 and (variant.parent / "run.json").is_file() and not (variant.parent / "metrics.json").exists()
