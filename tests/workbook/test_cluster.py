"""Sweeps on a cluster: one job a point, queued again or submitted again where it was stopped, reported and put together."""

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from clone import tracked

from dlr.__main__ import main
from dlr.runs import atomic_file, project_root, temporary
from dlr.workbook import cluster, sweepcommand, sweeps
from dlr.workbook.cluster import array_script, job_of, living, options_of

GRID = "phase: token_routing\ngrid: {seed: [0, 1]}\n"
FIRST, SECOND = "seed=0", "seed=1"
NOTEBOOK = '''# %% tags=["parameters"]
run_name: str = ""
seed: int = 0

# %%
import json, os, time
from pathlib import Path

folder = Path(os.environ["DLR_RESULTS"], "token_routing", run_name)
(folder / "run.new").write_text(json.dumps({"settings": {"seed": seed}}))
os.replace(folder / "run.new", folder / "run.json")          # whole or not at all, as runs write it
steps = folder / "steps.txt"
done = steps.read_text().split() if steps.exists() else []
with (folder / "begun.txt").open("a") as file:
    print(len(done), file=file)
for step in range(len(done), 6):
    while step == 3 and Path("../hold").exists():
        time.sleep(0.1)
    with steps.open("a") as file:
        print(step, file=file)
perplexity = 20 + seed + 0.1 * sum(map(int, steps.read_text().split()))
row = {"variant": "toy", "kind": "dense", "seed": seed, "target_skip": 0.4, "skip": 0.1, "perplexity": perplexity}
(folder / "metrics.json").write_text(json.dumps({"rows": [row]}))
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the runs of a sweep of two toy points go."""
    (tmp_path / "sweep.yaml").write_text(GRID)
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "r"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "r" / "token_routing"


def until(met, what: str, seconds: float = 300):
    end = time.time() + seconds
    while not (value := met()):
        assert time.time() < end, f"never: {what}"
        time.sleep(0.05)
    return value


def task_of(folder: Path) -> psutil.Process:
    """The process of a local job that runs the point; its parent, whose number the job has, only waits."""
    controller = psutil.Process(int(until(lambda: (job_of(folder) or {}).get("job"), "a job's number")))
    return until(controller.children, "a task")[0]


def kernels(folder: Path) -> list[psutil.Process]:
    return [process for process in task_of(folder).children(recursive=True) if "ipykernel" in " ".join(process.cmdline())]


def counted(folder: Path) -> list[str]:
    return (folder / "steps.txt").read_text().split() if (folder / "steps.txt").exists() else []


def is_over(folder: Path) -> bool:
    return not living({"": job_of(folder)})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the package, which jobs run in, with a notebook that counts to six, half way while there is a file `hold`."""
    for name in tracked():
        if name.startswith("dlr/") and not name.endswith(".safetensors"):
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project_root() / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "notebooks").mkdir()
    (tmp_path / "copy" / "notebooks" / "03_token_routing.py").write_text(NOTEBOOK)
    for module in (cluster, sweeps):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.slow
def test_a_sweep_outlives_a_preempted_and_a_killed_job(home, project, tmp_path, capsys):
    command = ["sweep", str(tmp_path / "sweep.yaml")]
    (project / "hold").touch()
    assert main([*command, "--cluster", "local"]) == 0
    assert "2 runs: 2 submitted" in capsys.readouterr().out
    for name in (FIRST, SECOND):
        until(lambda: counted(home / name) == ["0", "1", "2"], "half of a point")
    orphans = kernels(home / SECOND)
    task_of(home / SECOND).kill()
    task_of(home / FIRST).send_signal(signal.SIGUSR2)
    until(lambda: is_over(home / SECOND), "the killed job's end")
    assert main(command) == 1                                    # says how things are, and runs nothing of it
    said = capsys.readouterr().out
    assert "2 runs: 1 running, 1 failed" in said and f"  {SECOND}: failed" in said and "1 failed: seed=1" in said
    until(lambda: not [one for one in orphans if one.is_running() and one.status() != "zombie"], "the orphan's end")
    first = job_of(home / FIRST)
    assert orphans and main([*command, "--cluster", "local"]) == 0          # submits the failed one alone
    assert "1 running, 1 submitted" in capsys.readouterr().out and job_of(home / FIRST) == first
    (project / "hold").unlink()
    until(lambda: is_over(home / FIRST) and is_over(home / SECOND), "the end of both jobs")
    assert main(command) == 0
    assert "2 runs, 2 finished already" in capsys.readouterr().out
    assert Path(first["log"]).read_text().count("this job is preempted") == 1
    for name in (FIRST, SECOND):
        assert counted(home / name) == [str(step) for step in range(6)]
        assert (home / name / "begun.txt").read_text().split() == ["0", "3"], "it went on where it was stopped"
    table = (home / "table.md").read_text()
    shutil.move(home, tmp_path / "of-the-cluster")
    assert main([*command, "--jobs", "2"]) == 0
    assert (home / "table.md").read_text() == table and not list(home.glob("*/job.json"))


# -- which job has a point -----------------------------------------------------------------------
def test_of_two_submissions_at_once_one_has_a_point(tmp_path):
    assert cluster._claimed(tmp_path, None) and not cluster._claimed(tmp_path, None)
    assert living({"a": job_of(tmp_path)}) == {"a": "being submitted"}
    ended = {"cluster": "local", "job": "1", "host": platform.node(), "time": 0.0}
    (tmp_path / "job.json").write_text(json.dumps(ended))
    assert not living({"a": ended}), "another process has that number now"
    assert cluster._claimed(tmp_path, ended) and not cluster._claimed(tmp_path, ended), "nor do two take over"


def answers(monkeypatch, queue):
    def squeue(command, **options):
        if queue is None:
            raise FileNotFoundError("squeue")
        return subprocess.CompletedProcess(command, 0, queue, "")
    monkeypatch.setattr(cluster.subprocess, "run", squeue)


def test_slurm_says_how_its_jobs_are_and_silence_is_no_end(home, tmp_path, monkeypatch, capsys):
    for name, job in ((FIRST, "7_0"), (SECOND, "7_1")):
        (home / name).mkdir(parents=True)
        (home / name / "job.json").write_text(json.dumps({"cluster": "slurm", "job": job, "host": "x", "time": 0.0,
                                                           "log": f"{job}.err"}))
    monkeypatch.setattr(sweepcommand, "run_here", lambda phase, points, *rest: [name for name, _ in points])
    command = ["sweep", str(tmp_path / "sweep.yaml")]
    answers(monkeypatch, "6_1 RUNNING\n7_0 PENDING\n")
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "1 pending, 1 failed" in said and "7_1.err" in said and "7_0.err" not in said
    assert main([*command, "--jobs", "1"]) == 1 and not (home / SECOND / "job.json").exists()
    assert (home / FIRST / "job.json").exists() and "1 failed: seed=1" in capsys.readouterr().out
    answers(monkeypatch, None)
    assert main(command) == 2 and "squeue does not say" in capsys.readouterr().err


def test_slurm_gets_one_array_and_no_point_twice(home, tmp_path, monkeypatch, capsys):
    script = tmp_path / "array.sh"
    for name, text in (("srun", ""), ("sbatch", f"cp $1 {script}; echo Submitted batch job 7"),
                       ("squeue", "printf '7_0 PENDING\\n7_1 RUNNING\\n'")):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--cluster", "slurm", "--slurm", "partition=gpu,timeout_min=480,gpus_per_node=1"]
    assert main(command) == 0 and "2 submitted" in capsys.readouterr().out
    lines = set(script.read_text().splitlines())
    assert {"#SBATCH --array=0-1%2", "#SBATCH --partition=gpu", "#SBATCH --time=480", "#SBATCH --gpus-per-node=1"} <= lines
    assert [job_of(home / name)["job"] for name in (FIRST, SECOND)] == ["7_0", "7_1"]
    script.unlink()
    assert main(command) == 0 and "1 pending, 1 running" in capsys.readouterr().out and not script.exists()


# -- what a cluster is asked for -----------------------------------------------------------------
def test_options_are_names_and_values():
    assert options_of(["partition=gpu,timeout_min=480", "exclude=a,b,exclusive=true"]) == {
        "partition": "gpu", "timeout_min": 480, "exclude": "a,b", "exclusive": True}


@pytest.mark.parametrize("arguments, words", [
    (["--cluster", "slurm", "--slurm", "gpu"], "must read name=value"),
    (["--cluster", "local", "--slurm", "partition=gpu"], "goes with --cluster slurm"),
    (["--cluster", "slurm", "--slurm", "nodes=2"], "one task on one machine"),
    (["--cluster", "slurm", "--slurm", "timeout_min=60"], "no Slurm here"),
    (["--cluster", "local", "--jobs", "2"], "different ways"), (["--slurm", "partition=gpu"], "goes with --cluster slurm"),
    (["--point", "2"], "between 0 and 1"), (["--point", "0", "--force"], "--force has no effect"),
    (["--jobs", "0"], "must be 1 or more")])
def test_what_a_sweep_cannot_honour_is_refused(home, tmp_path, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    assert main(["sweep", str(tmp_path / "sweep.yaml"), *arguments]) == 2
    assert words in capsys.readouterr().err and not list(home.glob("*/job.json"))


def test_an_option_that_slurm_has_not_is_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: name)
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--cluster", "slurm", "--slurm"]
    assert main([*command, "partitoin=gpu,timeout_min=9"]) == 2 and "partitoin" in capsys.readouterr().err
    assert main([*command, "partition=gpu"]) == 2 and "gets 5 minutes" in capsys.readouterr().err
    assert not list(home.glob("*/job.json"))


def test_an_array_script_runs_a_point_a_task(home, tmp_path, monkeypatch, capsys):
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--print-array", "--slurm", "partition=gpu,timeout_min=480,mem_gb=16"]) == 0
    script = capsys.readouterr().out
    assert {"#SBATCH --array=0-1", "#SBATCH --partition=gpu", "#SBATCH --time=480", "#SBATCH --mem=16G"} <= set(script.splitlines())
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    run = []
    monkeypatch.setattr(sweepcommand, "run_point", lambda phase, name, parameters: run.append((phase, name, parameters["seed"])))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    line = next(line for line in script.splitlines() if line.startswith("python"))
    words = [os.path.expandvars(word.strip('"')) for word in line.removesuffix(" &").split()[3:]]
    assert main(words) == 0 and main(words) == 0                  # queued again, it is the same job
    assert run == [("token_routing", SECOND, 1)] * 2 and job_of(home / SECOND)["job"] == "9_1"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    answers(monkeypatch, "9_1 RUNNING\n")
    assert main(words) == 2 and "another job (9_1)" in capsys.readouterr().err
    answers(monkeypatch, "")
    assert main(words) == 0 and job_of(home / SECOND)["job"] == "10_1"
    assert array_script(["python"], 1, {"exclusive": True}).count("#SBATCH --exclusive\n") == 1


# -- runs beside one another ---------------------------------------------------------------------
@pytest.mark.parametrize("visible, cards", [(None, ["0", "1", "2"]), ("4,7", ["4", "7", "4"]), ("", [None] * 3)])
def test_runs_beside_one_another_each_get_a_card(monkeypatch, visible, cards):
    monkeypatch.setattr(sweeps.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [sweeps.slot_environment(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == cards


def test_machines_that_share_a_disk_never_share_a_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr("dlr.runs.os.getpid", lambda: 7)          # as another machine's process may have it
    names = {temporary(tmp_path / "m.json").name for _ in range(100)}
    assert len(names) == 100 and all(platform.node()[:20] in name and name.endswith(".tmp") for name in names)
    with atomic_file(tmp_path / "m.json") as one, atomic_file(tmp_path / "m.json") as other:
        one.write_text("1")
        other.write_text("2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.json", "1")]
