"""Run folders: what makes two runs one, where a run goes, the command line, sweeps, and results never half-written."""

import errno
import json
import os
import subprocess
import sys

import pytest

import dlr.runs
from dlr.base.identity import begin, differences, digest, inputs_of
from dlr.runs import Run, finished_runs, plain, project_root, slug, write_atomically
from dlr.settings import SettingsError
from dlr.workbook.phases import PHASES
from dlr.workbook.phases.training import TokenConfig
from dlr.workbook.places import Wanted, beside, named, open_run
from dlr.workbook.runner import comparable, results_table, seeds_table

COMMITTED = sorted((project_root() / "results").glob("*/*/run.json"))


def command(*arguments, cwd=None, **environment):
    return subprocess.run([sys.executable, "-m", "dlr", *arguments], cwd=cwd or project_root(), capture_output=True, text=True,
                          env=os.environ | {"DLR_PRESET": "toy", "PYTHONPATH": str(project_root()), **environment})


# -- identity ---------------------------------------------------------------------------------------------------------
def test_metrics_appear_last_and_whole(tmp_path):
    run = begin(Run(tmp_path / "r" / "a"), {"seed": 1, "steps": 2}, "abc")
    assert not run.done and run.exists and not finished_runs("r", tmp_path)
    run.finish([{"variant": "x", "perplexity": float("nan")}])
    assert run.done and run.rows == [{"variant": "x", "perplexity": None}]
    assert run.record["data_hash"] == "abc" and run.record["versions"]["torch"] and run.record["hardware"]["cores"]
    assert list(finished_runs("r", tmp_path)) == ["a"]
    for settings, data, words in (({"seed": 1, "steps": 3}, "abc", "steps: 2, now 3"),
                                  ({"seed": 1, "steps": 2}, "xyz", "data: abc, now xyz")):
        with pytest.raises(ValueError, match=f"other settings or data .{words}"):
            begin(run, settings, data)


def recorded(folder, config, data="abc", **inputs):
    return begin(Run(folder), config.model_dump(), data, inputs, type(config))


@pytest.mark.parametrize("before, now, differs", [
    ({}, {"bf16": True}, None), ({"bf16": True}, {}, None), ({"bf16": True}, {"bf16": False}, "bf16"),
    ({}, {"target_skip": 0.3}, "target_skip"), ({"run_name": "a"}, {"run_name": "b"}, None),
    ({"dataset": "/a/texts"}, {"dataset": "/b/texts"}, None),            # the data decides, below
    ({"model": "/a/one"}, {"model": "/a/two"}, "model"),
])
def test_settings_that_make_another_run(tmp_path, before, now, differs):
    run = recorded(tmp_path / "r", TokenConfig(**before))
    found = differences(run, TokenConfig(**now).model_dump(), "abc", {}, TokenConfig)
    assert list(found) == ([differs] if differs else [])
    assert "/a" not in (run.folder / "run.json").read_text()


def test_a_setting_that_is_new_orphans_no_old_run_and_a_changed_one_does(tmp_path):
    run = recorded(tmp_path / "r", TokenConfig(order_tokens=512))
    record = run.record
    del record["settings"]["kv"], record["settings"]["order_tokens"]              # as of a time before them
    (run.folder / "run.json").write_text(json.dumps(record))
    assert differences(run, TokenConfig().model_dump(), "abc", {}, TokenConfig) == {}
    assert list(differences(run, TokenConfig(order_tokens=512).model_dump(), "abc", {}, TokenConfig)) == ["order_tokens"]
    record["settings"] |= {"warm_tokens": 8, "unheard_of": 1}                    # one that is retired, and one that never was
    (run.folder / "run.json").write_text(json.dumps(record))
    assert list(differences(run, TokenConfig().model_dump(), "abc", {}, TokenConfig)) == ["unheard_of"]
    (run.folder / "run.json").write_text("{")
    assert "run.json" in differences(run, TokenConfig().model_dump(), "abc", {}, TokenConfig)


def test_the_same_name_with_other_files_is_another_run(tmp_path):
    for folder, content in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / folder / "base").mkdir(parents=True)
        (tmp_path / folder / "base" / "model.safetensors").write_text(content)
    configs = [TokenConfig(model=str(tmp_path / folder / "base")) for folder in "abc"]
    run = recorded(tmp_path / "r", configs[0], **inputs_of(configs[0]))
    assert list(differences(run, configs[1].model_dump(), "abc", inputs_of(configs[1]), TokenConfig)) == ["model"]
    assert differences(run, configs[2].model_dump(), "abc", inputs_of(configs[2]), TokenConfig) == {}


def test_a_large_file_is_told_apart_by_samples(tmp_path):
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(3_000_000))
    before = digest(path)
    with path.open("r+b") as file:
        file.seek(2_999_990)
        file.write(b"x")
    assert digest(path) != before and len(before) == 16


# Recorded runs and the settings that are today's way to ask for them.
TODAY = {"base_model/default": {}, "baselines/default": {}, "sequence_routing/default": {}, "token_routing/default": {},
         "latency/default": {}, "token_analysis/nano": {}}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: "/".join(p.parts[-3:-1]))
def test_committed_runs_are_the_runs_of_todays_settings(path, monkeypatch):
    """A setting that is added later must not orphan them: their own settings, completed, are still theirs."""
    run, phase = Run(path.parent), path.parts[-3]
    name = "/".join(path.parts[-3:-1])
    schema = PHASES[phase][1]
    if run.record["settings"].keys() - schema.model_fields.keys() - set(schema.retired):
        assert name == "evaluation/nano-router-5-shot-limit-2"                    # made by `dlr eval`, which has no schema
        return
    own = {name: value for name, value in run.record["settings"].items() if name not in schema.retired}
    for given in (own, *([TODAY[name]] if name in TODAY else [])):
        config = schema(**given)
        assert differences(run, config.model_dump(), run.record["data_hash"], {}, schema) == {}


def test_a_notebooks_defaults_are_a_recorded_run_shown_from_there(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    monkeypatch.setattr("dlr.base.identity._documents_hash", lambda dataset, splits: {
        3: "1b1040280b739aa0-a4e1718c840caa5b-6dc970c104bfb21e", 2: "6dc970c104bfb21e-a4e1718c840caa5b"}[len(splits)])
    for phase in ("base_model", "baselines", "sequence_routing", "token_routing", "latency", "token_analysis"):
        run = open_run(phase, PHASES[phase][1]())
        assert run.done and run.reused and run.folder.is_relative_to(project_root() / "results" / phase)
        assert "holds this run, made on 2026-" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*"))


# -- places -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder, and documents whose hash is 'data'."""
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    monkeypatch.setattr("dlr.base.identity.data_hash", lambda config: "data")
    monkeypatch.setattr("dlr.workbook.places.project_root", lambda: tmp_path / "nowhere")
    return tmp_path


def test_an_exploratory_run_has_a_place_of_its_own(results, capsys):
    first = open_run("token_routing", TokenConfig(target_skip=0.3))
    assert first.folder == results / "scratch" / "token_routing" / "target_skip=0.3" and not first.done
    again = open_run("token_routing", TokenConfig(target_skip=0.3))
    assert again.folder == first.folder and "goes on" in capsys.readouterr().out
    again.finish([])
    shown = open_run("token_routing", TokenConfig(target_skip=0.3))
    assert shown.folder == first.folder and shown.reused
    shown.figure("a picture", "comparison")
    assert not list(first.folder.glob("*.png"))
    other = open_run("token_routing", TokenConfig(target_skip=0.3, seed=1))
    assert other.folder.name == "seed=1-target_skip=0.3"
    assert open_run("token_routing", TokenConfig()).folder.name == "default"


def test_a_scratch_name_taken_by_other_data_is_told_apart(results, monkeypatch):
    first = open_run("token_routing", TokenConfig(target_skip=0.3))
    monkeypatch.setattr("dlr.base.identity.data_hash", lambda config: "other")
    second = open_run("token_routing", TokenConfig(target_skip=0.3))
    assert second.folder != first.folder and second.folder.name.startswith("target_skip=0.3-")


def test_a_named_run_is_made_resumed_shown_or_refused(results):
    run = open_run("token_routing", TokenConfig(run_name="mine"))
    assert run.folder == results / "token_routing" / "mine" and not run.done
    assert not open_run("token_routing", TokenConfig(run_name="mine")).done
    run.finish([])
    assert open_run("token_routing", TokenConfig(run_name="mine")).reused
    with pytest.raises(SettingsError, match="target_skip: 0.4, now 0.3.*name of its own"):
        open_run("token_routing", TokenConfig(run_name="mine", target_skip=0.3))


def test_the_command_lines_place(results, capsys):
    wanted = Wanted("token_routing", TokenConfig(target_skip=0.3))
    assert beside(wanted, "default").folder.name == "default" and not capsys.readouterr().out
    Wanted("token_routing", TokenConfig()).start(Run(results / "token_routing" / "default")).finish([])
    place = beside(wanted, "default")
    assert place.folder.name == "default-target_skip=0.3" and "target_skip: 0.4, now 0.3" in capsys.readouterr().out
    wanted.start(place)
    assert beside(wanted, "default").folder == place.folder
    with pytest.raises(SettingsError, match="--name with --force"):
        named(wanted, "default")
    assert named(wanted, "default", force=True).done


def test_a_forced_run_removes_what_a_run_leaves_and_nothing_else(tmp_path):
    run = Run(tmp_path / "r")
    for name in ("run.json", "metrics.json", "comparison.png", "comparison.pdf", "photo.png", "notes.txt", "DLR/log.csv",
                 "DLR/trainer/checkpoint-1/rng.pth", "DLR/checkpoint/router.safetensors", "DLR/mine.txt", "tasks/a/b.json"):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text("x")
    run.clear()
    assert sorted(p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()) == [
        "DLR/mine.txt", "notes.txt", "photo.png"]


def test_names_are_folders_never_paths():
    assert slug("..") != ".." and slug("../x") == "x" and slug(".hidden") == "hidden" and slug("") and slug("///")
    assert len({slug(text) for text in ("", "..", "/", "//")}) == 4


def test_relative_folders_in_the_environment_are_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLR_RESULTS", "out")
    assert dlr.runs.results_folder() == tmp_path / "out"
    monkeypatch.chdir(project_root() / "notebooks")                              # where JupyterLab starts kernels
    assert dlr.runs.results_folder() == project_root() / "out"


# -- tables -----------------------------------------------------------------------------------------------------------
def rows_of(folder, config, **perplexities):
    run = Wanted("pareto", config).start(Run(folder))
    run.finish([{"variant": name, "seed": config.seed, "target_skip": config.target_skip, "skip": config.target_skip,
                 "perplexity": value} for name, value in perplexities.items()])


def test_means_over_seeds_never_mix_targets_or_settings(results, capsys):
    ParetoConfig = PHASES["pareto"][1]
    for target in (0.2, 0.6):
        for seed in (0, 1):
            rows_of(results / "pareto" / f"{target}-{seed}", ParetoConfig(target_skip=target, seed=seed),
                    **{"cold": 100 * target + seed, "base": 27.0, "DLR": 30.0})
    table = seeds_table(results_table("pareto", results))
    cold = table[table["variant"] == "cold"]
    assert cold["target_skip"].tolist() == [0.2, 0.6] and cold["perplexity"].tolist() == [20.5, 60.5]
    assert table[table["variant"] == "base"]["runs"].tolist() == [4]
    rows_of(results / "pareto" / "long", ParetoConfig(target_skip=0.2, steps=400), cold=1.0)
    mixed = results_table("pareto", results)
    table = seeds_table(mixed)
    assert sorted(table[(table["variant"] == "cold") & (table["target_skip"] == 0.2)]["perplexity"]) == [1.0, 20.5]
    assert set(comparable(mixed)["run"]) == {"0.2-0", "0.2-1", "0.6-0", "0.6-1"}
    assert "Left out for their other settings: 1 of 5 runs (steps=400)" in capsys.readouterr().out
    assert seeds_table(results_table("pareto", results / "none")).empty


# -- files ------------------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "m.json").write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dlr.runs.os.fsync", full)
    with pytest.raises(OSError, match="m.json.*No space left.*nothing was changed"):
        write_atomically(tmp_path / "m.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"] and (tmp_path / "m.json").read_text() == "old"


def test_numbers_json_cannot_hold():
    assert plain({"a": [float("inf"), 1.5], 2: (1,)}) == {"a": [None, 1.5], "2": [1]}


# -- the command line -------------------------------------------------------------------------------------------------
def test_help_shows_an_example_for_every_command_and_every_phase(capsys):
    from dlr.__main__ import parser
    commands = parser()._subparsers._group_actions[0].choices
    for name, command_parser in {"": parser(), **commands}.items():
        assert f"python -m dlr {name}".strip() in command_parser.format_help().split("examples:")[1], name
    assert all(phase in commands["run"].format_help() for phase in PHASES)


def bad(*arguments):
    """(exit status, standard error) of a command in this process."""
    import contextlib
    import io

    from dlr.__main__ import main
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        return main(list(arguments)), stderr.getvalue()


@pytest.mark.parametrize("arguments, words", [
    (["run", "token_routing", "--set", "target_skp=0.3"], "did you mean 'target_skip'"),
    (["run", "tokens"], "unknown phase 'tokens'"),
    (["run", "token_routing", "--params", "params/none.yaml"], "No params file"),
    (["run", "token_routing", "--set", "lr=[x"], "cannot be read"),
    (["run", "token_routing", "--name", "../x"], "run_name='../x'"),
    (["run", "token_routing", "--name", ".."], "run_name='..'"),
    (["sweep", "params/token_routing/quick.yaml"], "a sweep file holds phase, grid"),
    (["sweep", "params/pareto/nano.yaml", "--name", "../x"], "names a folder"),
    (["notebooks", "9"], "there are: 00_base_model"),
])
def test_bad_input_is_one_sentence_and_no_folder(tmp_path, arguments, words, monkeypatch):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "r"))
    status, stderr = bad(*arguments)
    assert status == 2 and words in stderr
    assert stderr.count("\n") == 1 and "Traceback" not in stderr
    assert not list(tmp_path.rglob("*"))
    if arguments[0] == "run":
        with pytest.raises((ValueError, OSError)):                                # --debug shows where it comes from
            bad(*arguments, "--debug")


def test_a_bad_input_error_of_a_library_keeps_its_traceback(monkeypatch):
    """Only what this package refuses is a sentence: a ValueError from elsewhere is a fault of ours."""
    monkeypatch.setattr("dlr.workbook.sweepcommand.points_of", lambda *arguments: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        bad("sweep", "any.yaml")


@pytest.mark.slow
def test_what_only_the_notebook_can_find_ends_in_one_sentence(tmp_path):
    answer = command("run", "baselines", "--set", "always_keep=16", DLR_RESULTS=str(tmp_path), HF_HUB_OFFLINE="1")
    assert answer.returncode == 2 and "leave none of the model's 16 layers" in answer.stderr.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notebook.ipynb"]    # and the name is free


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failure_skips_what_is_done_and_refuses_what_is_other(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(300):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i} " * 30)
    sweep = tmp_path / "sweep.yaml"
    grid = "phase: baselines\ncommon: {{steps: {}, dataset: texts}}\ngrid:\n  - model: [/nowhere/llama, nano]\n"
    sweep.write_text(grid.format(2))
    where = {"cwd": tmp_path, "DLR_RESULTS": "r", "HF_HUB_OFFLINE": "1"}          # both relative to the caller's folder
    first = command("sweep", "sweep.yaml", "--jobs", "2", **where)
    assert first.returncode == 1 and "2 runs, 0 finished already" in first.stdout
    assert "1 failed" in first.stdout and "dense LoRA" in first.stdout
    done = tmp_path / "r" / "baselines" / "nano"
    assert (done / "metrics.json").is_file() and (done / "notebook.ipynb").is_file()
    assert Run(done).record["settings"]["dataset"] == "texts" and str(tmp_path) not in (done / "run.json").read_text()
    stamp = (done / "metrics.json").stat().st_mtime_ns
    again = command("sweep", "sweep.yaml", **where)
    assert again.returncode == 1 and "2 runs, 1 finished already" in again.stdout
    sweep.write_text(grid.format(3))
    other = command("sweep", "sweep.yaml", **where)
    assert other.returncode == 2 and "1 hold other settings or data (steps: 2, now 3)" in other.stderr
    assert (done / "metrics.json").stat().st_mtime_ns == stamp
