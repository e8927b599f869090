"""Run folders, the command line, sweeps that survive a failure, and results that are never half-written."""

import errno
import json
import subprocess
import sys

import pytest

from dlr.runs import Run, finished_runs, plain, project_root, write_atomically


def command(*arguments, **environment):
    import os
    return subprocess.run([sys.executable, "-m", "dlr", *arguments], cwd=project_root(), capture_output=True, text=True,
                          env=os.environ | {"DLR_PRESET": "toy", "PYTHONPATH": str(project_root()), **environment})


def test_metrics_appear_last_and_whole(tmp_path):
    run = Run(tmp_path / "r").start({"seed": 1, "steps": 2}, "abc")
    assert not run.done and not finished_runs("r", tmp_path)
    run.finish([{"variant": "x", "perplexity": float("nan")}])
    assert run.done
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["data_hash"] == "abc" and record["versions"]["torch"] and record["hardware"]["cores"]
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["rows"][0]["perplexity"] is None
    with pytest.raises(ValueError, match="other settings .steps"):
        Run(tmp_path / "r").start({"seed": 1, "steps": 3}, "abc")


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


def test_help_shows_an_example():
    for arguments in (["--help"], ["run", "--help"], ["sweep", "--help"]):
        answer = command(*arguments)
        assert answer.returncode == 0 and "python -m dlr sweep params/pareto/nano.yaml" in answer.stdout


@pytest.mark.parametrize("arguments, words", [
    (["run", "token_routing", "--set", "target_skp=0.3"], "did you mean 'target_skip'"),
    (["run", "tokens"], "unknown phase 'tokens'"),
    (["run", "token_routing", "--params", "params/none.yaml"], "No params file"),
    (["run", "token_routing", "--set", "lr=1e-4"], "write 1.0e-4"),
    (["sweep", "params/token_routing/quick.yaml"], "a sweep file holds phase, grid"),
])
def test_bad_input_is_one_sentence_and_no_folder(tmp_path, arguments, words):
    answer = command(*arguments, DLR_RESULTS=str(tmp_path))
    assert answer.returncode == 2 and words in answer.stderr
    assert answer.stderr.count("\n") == 1 and "Traceback" not in answer.stderr
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("setting, words", [
    ("model=/nowhere/llama", "Without a network use model='nano'"),
    ("dataset=/nowhere/texts", "dataset='embedded'"),
    ("always_keep=16", "leave none of the model's 16 layers"),
])
def test_what_only_the_notebook_can_find_ends_in_one_sentence(tmp_path, setting, words):
    answer = command("run", "baselines", "--set", setting, DLR_RESULTS=str(tmp_path), HF_HUB_OFFLINE="1")
    assert answer.returncode == 2 and words in answer.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failure_and_skips_what_is_done(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("phase: baselines\ngrid:\n  - model: [/nowhere/llama, nano]\n")
    first = command("sweep", str(sweep), "--jobs", "2", DLR_RESULTS=str(tmp_path / "r"), HF_HUB_OFFLINE="1")
    assert first.returncode == 1 and "2 runs, 0 finished already" in first.stdout
    assert "1 failed" in first.stdout and "dense LoRA" in first.stdout
    done = tmp_path / "r" / "baselines" / "nano"
    assert (done / "metrics.json").is_file() and (done / "notebook.ipynb").is_file()
    stamp = (done / "metrics.json").stat().st_mtime_ns
    again = command("sweep", str(sweep), DLR_RESULTS=str(tmp_path / "r"), HF_HUB_OFFLINE="1")
    assert again.returncode == 1 and "2 runs, 1 finished already" in again.stdout
    assert (done / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_the_tour_says_what_it_does_and_where_things_are(tmp_path):
    answer = command("run", DLR_RESULTS=str(tmp_path))
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "About" in answer.stdout and "two CPU cores" in answer.stdout
    folder = tmp_path / "token_routing" / "quick"
    for name in ("metrics.json", "table.md", "comparison.png", "comparison.pdf", "notebook.ipynb", "run.json"):
        assert (folder / name).is_file(), name
        assert name in answer.stdout or name in ("metrics.json", "comparison.pdf", "run.json")
    rows = {row["variant"] for row in json.loads((folder / "metrics.json").read_text())["rows"]}
    assert rows == {"base", "DLR", "DLR, shuffled", "DLR, mean plan", "DLR, random plan", "best static", "dense LoRA"}
    assert "finished before" in command("run", DLR_RESULTS=str(tmp_path)).stdout
