"""The registry and the command: every figure says what it reads and what makes it; redrawing changes no byte."""

import re
import shlex

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread

from dlr.__main__ import parser
from dlr.figures import __main__ as command
from dlr.figures import register
from dlr.figures.register import ORIGINALS, figure, missing, redraw, registered
from dlr.runs import Run, project_root

ROOT = project_root()
RESULTS = ROOT / "results"
# Points and lines, an image with words and signs, bars on a logarithmic axis.
SEVERAL = ["pareto_calibration", "token_analysis_token_map", "base_model_layer_harm"]


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("only, names", [(None, ["mine_a", "mine_b"]), ("b", ["mine_b"]), ("c", [])])
def test_a_figure_registers_itself_and_is_drawn_of_the_runs_it_names(tmp_path, monkeypatch, only, names):
    for name, height in (("a", 1), ("b", 2)):
        Run(tmp_path / "x" / name).finish([{"height": height}])
    phases = {phase for entry in registered().values() for phase in entry.phases}
    assert phases >= {"pareto", "latency", "evaluation", "token_analysis", "base_model"}
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    monkeypatch.setattr(register, "FIGURES", {})

    @figure("x", lambda runs: {f"mine_{name}": (run.rows[0]["height"],) for name, run in runs.items()}, only)
    def mine(height):
        return plt.figure(figsize=(1, height)) if height else None

    assert [path.stem for path in redraw(folder=tmp_path / "figures")] == names
    assert [entry.name for entry in missing()] == ([] if names else ["x_mine"])
    assert [path.name for path in redraw(tmp_path / "x" / "a")] == ["mine_a.png"]
    assert (tmp_path / "x" / "a" / "mine_a.pdf").is_file() and not plt.get_fignums()


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not finished"):
        redraw(tmp_path)


def test_each_of_the_first_studies_figures_has_one_in_its_place():
    stood_for = [name for entry in registered().values() for name in entry.replaces]
    assert len(set(ORIGINALS)) == 17 and set(stood_for) == set(ORIGINALS)


@pytest.mark.parametrize("name", registered())
def test_a_figure_says_what_it_shows_and_reads_and_what_makes_it(name):
    entry = registered()[name]
    assert entry.name == name and re.fullmatch(r"[A-Z].+\.", entry.title)
    python, flag, module, *words = shlex.split(entry.command)
    assert (python, flag, module) == ("python", "-m", "dlr")
    arguments = parser().parse_args(words)
    given = getattr(arguments, "params", None) or getattr(arguments, "file", None)
    assert given is None or (ROOT / given).is_file()
    if entry.files_of(RESULTS):
        assert all(any(RESULTS.glob(f"{phase}/{entry.run or '*'}/{file}")) for file in entry.reads
                   for phase in entry.phases), entry.sources


def test_what_is_committed_is_what_is_registered():
    """A figure whose data came or went is drawn anew, or removed."""
    files = [file for entry in registered().values() for file in entry.files_of(RESULTS)]
    assert len(files) == len(set(files)), "two figures would share a file"
    for ending in ("png", "pdf"):
        kept = {path.stem for path in (ROOT / "figures").glob(f"*.{ending}")} - {"explorer"}
        assert kept == set(files), "python -m dlr.figures"


def test_redrawing_changes_no_byte_and_committed_figures_are_of_these_results(tmp_path):
    """Whatever the caller's own look is; pixels are compared, since text is set otherwise on another processor."""
    for name in SEVERAL:
        first = redraw(folder=tmp_path / "a", only=name, results=RESULTS)
        with plt.style.context("dark_background"):
            plt.rcParams.update({"font.size": 20, "savefig.bbox": "tight", "pdf.fonttype": 3})
            second = redraw(folder=tmp_path / "b", only=name, results=RESULTS)
        assert first and [path.name for path in first] == [path.name for path in second]
        for one, other in zip(first, second):
            for ending in (".png", ".pdf"):
                assert one.with_suffix(ending).read_bytes() == other.with_suffix(ending).read_bytes(), one.stem
            assert b"Date" not in one.with_suffix(".pdf").read_bytes()
            assert b"/Type3" not in one.with_suffix(".pdf").read_bytes(), "fonts are TrueType"
            new, kept = imread(one), imread(ROOT / "figures" / one.name)
            assert new.shape == kept.shape and np.abs(new - kept).mean() < 0.004, f"{one.stem}: python -m dlr.figures"


# -- the command -----------------------------------------------------------------------
def test_the_list_names_every_figure_and_draws_none(capsys):
    assert command.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{entry.name}: {entry.title}" in told and entry.command in told for entry in registered().values())


def test_one_figure_is_drawn_from_a_folder_of_results_into_another(tmp_path, capsys):
    Run(tmp_path / "base_model/mine").finish([{"variant": "base"}], layer_harm=[3.0, 1.0, 2.0])
    options = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command.main(["--only", "base_model_layer_harm", *options]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"base_model_layers.png", "base_model_layers.pdf"}
    assert "Not drawn" not in capsys.readouterr().out
    assert command.main(["--only", "phase_transition", *options]) == 1
    assert "phase_transition: python -m dlr run sequence_routing" in capsys.readouterr().out
    assert command.main([str(tmp_path / "base_model/mine")]) == 0
    assert (tmp_path / "base_model/mine/layers.png").is_file()


def test_what_is_missing_is_listed_with_its_command(tmp_path, capsys):
    assert command.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert all(f"  {entry.name}: {entry.command}" in told for entry in registered().values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--only", "nothing"], "There is no figure 'nothing'.*pareto_frontier"),
    (["--results", "missing"], "--results missing is no folder"),
    (["results/pareto/router-seed=0", "--results", "results"], "leave --results out"),
    (["results"], "has no metrics.json"),
])
def test_what_cannot_be_drawn_is_refused_with_a_sentence(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        command.main(words)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
