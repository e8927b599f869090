"""Every command of the README, run in a copy of a clone, leaves what the README says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from clone import contents, copy_project, environment, needs_the_recorded_corpus

from dlr.__main__ import parser
from dlr.runs import Run, project_root
from dlr.train.several import share_of_batch
from dlr.workbook.runner import checked_parameters, effective_of

README = (project_root() / "README.md").read_text(encoding="utf-8")
SET_UP = {"python3 -m venv .venv", ". .venv/bin/activate",               # what .ci/run does
          "pip install -q -r requirements.txt", "python -m pytest", "jupyter lab"}
PLACEHOLDERS = {"CHECKPOINT": "nano-router", "DIR": "no-such-folder"}


def commands() -> list[str]:
    """The commands in indented blocks, without set-up, comments and repetitions."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines = [line.strip() for line in re.findall(r"(?m)^ {4}(\S.*)$", prose)]
    parts = [shlex.join(shlex.split(part, comments=True))
             for line in lines for part in line.split(" && ")]
    return list(dict.fromkeys(part for part in parts if part not in SET_UP))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp("clone"))
    before = contents(folder)
    yield folder
    assert contents(folder) == before, "a command of the README changed what is committed"


def call(clone, text: str, **changes):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text)]
    program = {"python": [], "papermill": ["-m", "papermill"]}[words[0]]
    return python(clone, *program, *words[1:], **changes)


def python(clone, *arguments: str, **changes):
    return subprocess.run([sys.executable, *arguments], cwd=clone, capture_output=True, text=True,
                          env=environment(clone, **changes))


def ran(folder: str, **settings):
    """The command ran a notebook, into results/<folder>, with these settings."""
    def check(clone, answer):
        assert answer.returncode == 0, answer.stderr[-2000:]
        found = [Run(path.parent) for path in (clone / "results").glob(f"{folder}/metrics.json")]
        fitting = [run for run in found if settings.items() <= run.record["settings"].items()]
        assert fitting and fitting[0].rows, answer.stdout
        for name in ("notebook.ipynb", "table.md", "comparison.png"):
            assert (fitting[0].folder / name).is_file(), name
        return fitting[0]
    return check


def tour(clone, answer):
    run = ran("token_routing/quick")(clone, answer)
    assert "About" in answer.stdout and "two CPU cores" in answer.stdout
    for name in ("table.md", "comparison.png", "notebook.ipynb"):
        assert str(run.folder / name) in answer.stdout
    assert {row["variant"] for row in run.rows} == {
        "base", "DLR", "DLR, shuffled", "DLR, mean plan", "DLR, random plan", "best static",
        "dense LoRA"}
    again = call(clone, "python -m dlr run")
    assert again.returncode == 0 and "finished before" in again.stdout


def refused(*words):
    """Without a network the command ends in one sentence and leaves nothing that looks finished."""
    def check(clone, answer):
        assert answer.returncode == 2, answer.stderr[-2000:]
        assert all(word in answer.stderr.splitlines()[-1] for word in words), answer.stderr[-2000:]
    return check


def shown(*words):
    def check(clone, answer):
        assert answer.returncode == 0, answer.stderr[-2000:]
        assert all(word in answer.stdout for word in words), answer.stdout
    return check


def recorded_sweep(clone, answer):
    shown("| best static at 40%", "0 failed")(clone, answer)
    count, finished = re.search(r"(\d+) runs, (\d+) finished already", answer.stdout).groups()
    assert count == finished != "0"


def papermill(clone, answer):
    assert answer.returncode == 0, answer.stderr[-2000:]
    text = (clone / "out.ipynb").read_text(encoding="utf-8")
    assert "holds this run" in text                                 # the tour above made it


# Command to what must be true afterwards; a new one is added here. 'Recorded' commands are in
# results/, so that nothing has to run: no toy preset.
RECORDED = {"DLR_PRESET": ""}
EXPECTED = {
    "python -m dlr run": (tour, {}),
    "python -m dlr run token_routing --set target_skip=0.3": (
        ran("token_routing/default-*", target_skip=0.3), {}),
    "python -m dlr sweep params/pareto/nano.yaml --jobs 2": (
        recorded_sweep, RECORDED),
    "papermill notebooks/03_token_routing.ipynb out.ipynb -f params/token_routing/quick.yaml": (
        papermill, {}),
    "python -m dlr report": (None, {}),               # tests/workbook/test_report.py, notebook 12
    "python -m dlr explore --base smollm2 'Any text.'": (None, {}),     # brings 93 MB: test_explorer_embedded.py
    "python -m dlr explore --serve": (None, {}),       # does not end by itself: tests/explore/test_serve.py
    "python -m dlr plan token_routing --params params/token_routing/qwen2.5-3b-4bit.yaml --memory 8GB": (
        None, {}),                                    # tests/workbook/test_planning.py
    "torchrun --nproc-per-node 8 -m dlr train --params params/token_routing/llama3.1-8b.yaml "
    "--set batch_size=8 --set accumulation=2": (None, {}),     # tests/train/test_two_processes.py
    "python -m dlr sweep params/pareto/llama3.1-8b.yaml --cluster slurm --slurm timeout_min=480"
    ",gpus_per_node=1": (None, {}),              # tests/workbook/test_cluster.py
    "python -m dlr eval CHECKPOINT --tasks mmlu,arc_challenge,gsm8k --num-fewshot 5": (
        refused("--data-dir"), {}),
}


def test_every_command_of_the_readme_is_known_here():
    assert set(commands()) == set(EXPECTED)
    assert "python -m dlr" in README and "```python" in README


def test_the_processes_of_the_readme_share_the_batch_and_the_step_stays_the_files(monkeypatch):
    monkeypatch.delenv("DLR_PRESET", raising=False)
    monkeypatch.chdir(project_root())
    (text,) = [text for text in EXPECTED if text.startswith("torchrun")]
    words = shlex.split(text)
    given = parser().parse_args(words[words.index("dlr") + 1:])
    phase = Path(given.params).parent.name
    config, file = (effective_of(phase, checked_parameters(phase, given.params, changes))
                    for changes in (given.set, []))
    assert share_of_batch(config.batch_size, int(words[words.index("--nproc-per-node") + 1])) == 1
    assert config.batch_size * config.accumulation == file.batch_size * file.accumulation


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text, (check, _) in EXPECTED.items() if check])
def test_a_command_does_what_it_says(text, clone):
    check, changes = EXPECTED[text]
    if changes == RECORDED:
        needs_the_recorded_corpus()
    check(clone, call(clone, text, **changes))


@pytest.mark.slow
def test_what_is_reported_is_recorded_and_not_run_again(clone):
    """The commands in results/README.md made its numbers: each is finished in a clone."""
    needs_the_recorded_corpus()
    prose = " ".join((project_root() / "results" / "README.md").read_text(encoding="utf-8").split())
    run = "python -m dlr run"
    made = {f"{run} latency --params params/latency/tinyllama.yaml": "results/latency/tinyllama",
            f"{run} latency": "results/latency/default",
            f"{run} token_analysis --params params/token_analysis/nano.yaml":
                "results/token_analysis/nano"}
    assert all(f"`{text}`" in prose for text in made)
    program = ("import sys\nfrom dlr.__main__ import main\n"
               "sys.exit(max(main(line.split()[3:]) for line in sys.argv[1:]))")
    answer = python(clone, "-c", program, *made, **RECORDED)
    assert answer.returncode == 0, answer.stderr[-2000:]
    for folder in made.values():
        assert re.search(rf"finished before, made on .*{folder}\n", answer.stdout), answer.stdout


@pytest.mark.slow
def test_the_python_of_the_readme_runs(clone):
    for program in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        answer = python(clone, "-c", program)
        assert answer.returncode == 0, answer.stderr[-2000:]
