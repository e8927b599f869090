"""Notebooks: pairs agree, the edited half runs, outputs show results/, and those stay untouched."""

import html
import itertools
import json
import os
import re
import subprocess
import sys

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from clone import contents, copy_project, environment

import dlr
from dlr.base.data import load_documents, padded_batches
from dlr.base.models import NANO_ROUTER, load_base
from dlr.figures.training import comparison, keep_rates, training, verdicts
from dlr.measure.evaluate import evaluate, router_logits, skip_ratio
from dlr.routing.policy import RouterPolicy
from dlr.runs import alike, finished_runs, kind_of, project_root, Run
from dlr.settings import SettingsError
from dlr.train.settings import RunConfig
from dlr.workbook import findings, notebooks
from dlr.workbook.phases import PHASES
from dlr.workbook.runner import results_table, seeds_table, shown

NAMES = [name for name, _ in PHASES.values()]
RESULTS = project_root() / "results"


def committed(name: str):
    return nbformat.read(project_root() / "notebooks" / f"{name}.ipynb", as_version=4)


def pareto_runs() -> dict[str, Run]:
    """Those that notebook 04 shows: of the embedded model, on the embedded corpus."""
    found = {name: Run(RESULTS / "pareto" / name) for name in finished_runs("pareto", RESULTS)}
    return alike(found)["nano", "embedded", 40]


def outputs(name: str) -> list:
    return [output for cell in committed(name).cells if cell.cell_type == "code"
            for output in cell.outputs]


def text_of(output) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


# -- as they are committed -----------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_pairs_agree_cell_by_cell(name):
    script = jupytext.read(project_root() / "notebooks" / f"{name}.py")
    cells = [[(cell.cell_type, cell.source.strip(), tuple(cell.metadata.get("tags", [])))
              for cell in notebook.cells] for notebook in (script, committed(name))]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_hold_executed_output_and_stay_readable(name):
    path = project_root() / "notebooks" / f"{name}.ipynb"
    code = [c for c in committed(name).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "not executed"
    pictures = [o["data"]["image/png"] for o in outputs(name) if "image/png" in o.get("data", {})]
    assert pictures and len(pictures) == len(set(pictures)), "no figure, or one twice"
    assert path.stat().st_size < 1_000_000
    assert all(len(c.source.splitlines()) <= 20 for c in code)
    for output in outputs(name):
        assert output.get("name") != "stderr"
        noise = r" object at 0x|\d%\||Loading weights|Traceback"
        assert not re.search(noise, text_of(output))


def tables(name: str) -> list[list[str]]:
    """Cells of every table a committed notebook shows, without the index."""
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs(name)]
    return [[html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page, re.DOTALL)]
            for page in pages if page]


def same_cells(shown_cells: list[str], frame: pd.DataFrame) -> bool:
    expected = frame.to_numpy().ravel().tolist()
    return len(shown_cells) == len(expected) and all(map(same_cell, shown_cells, expected))


def same_cell(text: str, value) -> bool:
    if isinstance(value, str):
        return text == value
    if value is None or value != value:
        return text in ("NaN", "None")
    return abs(float(text) - value) <= 1e-9 + 5e-4 * abs(value)


def frames(phase: str, run: Run) -> list[pd.DataFrame]:
    """What a notebook shows of a run, computed from results/."""
    table = pd.DataFrame(run.rows) if run.done else pd.DataFrame()
    if phase in ("baselines", "sequence_routing", "token_routing"):
        return [shown(run.rows)]
    if phase == "pareto":
        return [seeds_table(results_table("pareto", RESULTS, pareto_runs())), verdicts(pareto_runs()).round(4)]
    if phase == "latency":
        reached = table.query("system == 'compact' and part == 'layers' and work == 'prefill'")
        reached = reached[reached["skip"] > 0]
        columns = ["skip", "bound", "product_bound", "row_cost"]
        products = pd.DataFrame(run.metrics["products"])[columns]
        return [pd.DataFrame(run.metrics["costs"]).round(3),
                pd.DataFrame(run.metrics["profile"]).round(1),
                products.assign(compact=reached["speedup"].tolist()).round(3)]
    if phase == "token_analysis":
        kinds = pd.DataFrame(run.metrics["categories"]).filter(regex="^(?!keep)")
        kinds = kinds.sort_values("active_layers").round(3)
        return [table.round(3), kinds, pd.DataFrame(run.metrics["information"]).T.round(4)]
    return [table.round(3)]


@pytest.mark.parametrize("phase", ["base_model", "baselines", "sequence_routing", "token_routing",
                                   "pareto", "latency", "token_analysis"])
def test_committed_notebooks_show_what_results_hold(phase):
    name = PHASES[phase][0]
    said = re.search(r"(results/\S+) holds this run", "".join(map(text_of, outputs(name))))
    assert said or phase == "pareto", "none is shown; python -m dlr notebooks"
    run = Run(project_root() / (said[1] if said else "results/pareto"))
    there = tables(name)
    for frame in frames(phase, run):
        assert any(same_cells(cells, frame) for cells in there), frame


def test_no_result_or_notebook_names_a_machine():
    root = project_root()
    patterns = ("results/*/*/*.json", "notebooks/*.ipynb", "results/*/*/*.ipynb", "results/**/*.md")
    for path in itertools.chain.from_iterable(map(root.glob, patterns)):
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text and "/root/" not in text and "/home/" not in text, path


# They report no perplexity, or (10) one of the same documents as 04, or (11) that of another corpus,
# or (12) those of the others.
UNTRAINED = ("06_latency", "08_explorer", "09_depth_router", "10_stages", "11_predecessor", "12_report")


def test_one_sentence_tells_the_perplexities_apart():
    from dlr.bench import wikitext
    from dlr.workbook import base_model as basemodel
    said = set()
    for name in (name for name in NAMES if name not in UNTRAINED):
        prose = " ".join(" ".join(cell.source.split()) for cell in committed(name).cells
                         if cell.cell_type == "markdown")
        said |= set(re.findall(r"Perplexities of one model differ.*? in 07\.", prose)) or {name}
    assert len(said) == 1
    numbers = [int(number) for number in re.findall(r"\b[1-9]\d+\b", said.pop())]
    lengths, study, rows = RunConfig(), PHASES["token_analysis"][1](), PHASES["evaluation"][1]()
    assert numbers == [basemodel.CONTEXT, lengths.eval_len, PHASES["baselines"][1]().eval_docs,
                       rows.limit, wikitext.WINDOW, wikitext.STRIDE, study.eval_len,
                       study.record_docs]


# -- what they say -------------------------------------------------------------------------------
def test_any_subset_of_variants_is_drawn_and_told():
    rows = Run(RESULTS / "token_routing" / "default").rows
    verdict = {"nll_difference": -0.01, "low": -0.02, "high": 0.01}
    names = ("v1", "cold", "DLR", "best static", "dense LoRA")
    for chosen in [(), *itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        some = [row for row in rows if row["variant"].split(",")[0] in ("base", *chosen)]
        comparison(some)
        keep_rates([row for row in some if kind_of(row) not in ("base", "dense")])
        both = {"DLR", "best static"} <= set(chosen)
        told = findings.token_routing(some, 0.4, verdict if both else None)
        assert ("not distinguishable from the best static plan" in told) == both
        plt.close("all")
    assert training({}) is None
    told = findings.token_routing(rows, 0.4, None)
    cold, random = (next(row["perplexity"] for row in rows if row["variant"] == name)
                    for name in ("cold", "cold, random plan"))
    assert f"**cold**, whose router was trained end to end, at perplexity {cold:.1f}" in told
    assert f"worse than its random plan ({random:.1f})" in told and "99.6 % (v2)" in told


def test_findings_follow_the_numbers():
    rows = Run(RESULTS / "baselines" / "default").rows
    assert "from 27.18 to 26.81" in findings.baselines(rows)
    assert "random" not in findings.baselines(rows[:3])
    assert "better than it in 3 of 3" in findings.frontier(verdicts(pareto_runs()))
    assert "No finished run" in findings.frontier(verdicts({}))
    assert "layers 1; a static plan" in findings.base_model([], [1.0, 0.0, 0.5])
    prices = [{"variant": f"lambda = {price}", "skip": skip, "perplexity": 1.0}
              for price, skip in enumerate((0.5, 0.2))]
    assert "did not always" in findings.sequence(prices)
    run = Run(RESULTS / "evaluation" / "nano")
    told = findings.evaluation(run.rows, run.metrics["against_static"])
    assert "DLR 20 % is worse than best static 20 % by 0.0030" in told
    assert "bound 1.43" in findings.latency(pd.DataFrame(Run(RESULTS / "latency" / "default").rows))


# -- as they are run -----------------------------------------------------------------------------
@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A folder of notebooks of one's own, with one pair in it."""
    monkeypatch.setattr(notebooks, "folder", lambda: tmp_path)
    source = '# %% tags=["parameters"]\nsteps: int = 1\nname = make()\n'
    notebook = jupytext.reads(source, fmt="py:percent")
    nbformat.write(notebook, tmp_path / "x.ipynb")
    jupytext.write(notebook, tmp_path / "x.py", fmt="py:percent")
    return tmp_path


@pytest.mark.parametrize("edited, age", [(".py", 1), (".py", -1), (".ipynb", 1), (".py", 0)])
def test_the_half_that_was_saved_last_runs(pair, edited, age):
    said = []
    assert notebooks.cell_defaults(notebooks.read_pair("x", said.append)) == {"steps": 1}
    assert not said
    path = pair / f"x{edited}"
    path.write_text(path.read_text().replace("steps: int = 1", "steps: int = 2"))
    other = pair / ("x.py" if edited == ".ipynb" else "x.ipynb")
    os.utime(path, ns=(10**18, 10**18 + age))
    os.utime(other, ns=(10**18, 10**18))
    if age == 0:
        with pytest.raises(SettingsError, match="differ and were saved at the same time"):
            notebooks.read_pair("x", said.append)
        return
    steps = 2 if age > 0 else 1
    assert notebooks.cell_defaults(notebooks.read_pair("x", said.append)) == {"steps": steps}
    assert "differ" in said[0] and f"x{edited if age > 0 else other.suffix}, saved last" in said[0]


def test_without_ipykernel_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="has no ipykernel.*pip install"):
        notebooks.execute(None, tmp_path / "x.ipynb", {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_an_edited_script_runs_under_the_python_that_was_called(project, tmp_path):
    kernel = tmp_path / "kernels" / "python3" / "kernel.json"        # of a Python without ipykernel
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/nowhere/python", "{connection_file}"],
                                  "display_name": "x", "language": "python"}))
    script = project / "notebooks" / "06_latency.py"
    before = script.read_text()
    edit = "import sys\nraise RuntimeError('the edit ran in ' + sys.executable)\n"
    script.write_text(before.replace("import sys\n", edit, 1))
    command = [sys.executable, "-m", "dlr", "run", "latency", "--name", "edited"]
    try:
        answer = subprocess.run(command, cwd=project, text=True, capture_output=True,
                                env=environment(project, JUPYTER_PATH=str(tmp_path)))
    finally:
        script.write_text(before)
        (project / "notebooks" / "06_latency.ipynb").touch()
    assert answer.returncode == 1 and f"the edit ran in {sys.executable}" in answer.stderr
    assert "06_latency.py, saved last, is what runs" in answer.stdout


# Changes that alter what a notebook does; nbval runs all under the toy preset's.
CHANGED = {"02_sequence_routing": {"penalties: list = [0.3, 1.0, 3.0]": "penalties: list = []"},
           "03_token_routing": {'["v1", "v2", "cold", "DLR", "DLR without KD", "best static", '
                                '"dense LoRA"]':
                                '["dense LoRA"]'},
           "06_latency": {"skips: list = [0.25, 0.4, 0.5]": "skips: list = [0.6]"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_run_all_with_a_changed_parameter_in_a_clone_writes_to_scratch_alone(name, project):
    """As in JupyterLab: a kernel in notebooks/, the project's results folder, no command line."""
    from nbclient import NotebookClient
    before, notebook = contents(project), jupytext.read(project / "notebooks" / f"{name}.py")
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for old, new in CHANGED[name].items():
        assert old in cell.source
        cell.source = cell.source.replace(old, new)
    client = NotebookClient(notebook, timeout=600, kernel_manager_class=notebooks.SamePython,
                            resources={"metadata": {"path": str(project / "notebooks")}})
    client.execute(env=environment(project))
    phase = next(phase for phase, (notebook_name, _) in PHASES.items() if notebook_name == name)
    assert len(list((project / "results" / "scratch" / phase).glob("*/metrics.json"))) == 1
    assert contents(project) == before


# -- what they rest on ---------------------------------------------------------------------------
def test_recorded_skip_ratios_are_within_a_point_of_their_targets():
    rows = [row for name, run in finished_runs("pareto", RESULTS).items()
            for row in run["metrics"]["rows"] if row["kind"] == "routed" and row["documents"] >= 100]
    assert {row["target_skip"] for row in rows} >= {0.2, 0.4, 0.6}
    assert len({row["seed"] for row in rows}) >= 2
    for row in rows:
        assert abs(row["skip"] - row["target_skip"]) <= 0.01, row


def test_the_embedded_model_fits_its_room():
    nano = project_root() / "dlr" / "nano"
    files = [p for p in nano.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.parent == nano) <= 16e6
    assert sum(p.stat().st_size for p in files if p.parent != nano) <= 4e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


@pytest.mark.slow
def test_the_shipped_router_meets_its_budget_and_the_dial_on_the_test_split():
    """Within a point where calibrated, two elsewhere on the dial; the plan is what logits say."""
    model, tokenizer = dlr.from_pretrained(NANO_ROUTER), load_base()[1]
    routing, documents = dlr.routing_of(model), load_documents("embedded", "test")
    batches = padded_batches(documents, tokenizer, 256, 16)
    logits, forced = router_logits(model, routing, batches)
    measured = {}
    for skip in (0.0, 0.1, 0.25, 0.4, 0.6, 0.8):
        with dlr.budget(model, skip=skip):
            measured[skip] = (logits <= routing.threshold).sum().item() / (logits.numel() + forced)
    assert all(abs(found - skip) <= 0.02 for skip, found in measured.items()), measured
    assert abs(measured[0.4] - 0.4) <= 0.01
    assert list(measured.values()) == sorted(measured.values())
    few = padded_batches(documents, tokenizer, 128, 8, limit=8)
    expected, forced = router_logits(model, routing, few)
    found = skip_ratio(evaluate(model, routing, few, RouterPolicy(), bar=False))
    skipped = (expected <= routing.threshold).sum().item()
    assert abs(found - skipped / (expected.numel() + forced)) < 1e-6
