"""The committed notebooks: pairs agree, outputs are there and small, results are what they claim."""

import jupytext
import nbformat
import pytest
import torch

import dlr
from dlr.config import PHASES, RunConfig
from dlr.data import load_documents, padded_batches
from dlr.evaluate import evaluate, skip_ratio
from dlr.models import NANO_ROUTER, load_base
from dlr.policy import RouterPolicy
from dlr.runs import finished_runs, project_root

NAMES = [name for name, _ in PHASES.values()]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_agree_cell_by_cell(name):
    folder = project_root() / "notebooks"
    pair = [jupytext.read(folder / f"{name}.py"), nbformat.read(folder / f"{name}.ipynb", as_version=4)]
    cells = [[(c.cell_type, c.source.strip(), tuple(c.metadata.get("tags", []))) for c in notebook.cells]
             for notebook in pair]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_hold_executed_output_and_stay_readable(name):
    path = project_root() / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "not executed"
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs), "no figure"
    assert path.stat().st_size < 1_000_000
    assert all(len(c.source.splitlines()) <= 20 for c in code)


def test_no_result_or_notebook_names_a_machine():
    root = project_root()
    for path in [*root.glob("results/**/*.json"), *root.glob("notebooks/*.ipynb"), *root.glob("results/**/*.md")]:
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text and "/root/" not in text and "/home/" not in text, path


def test_recorded_skip_ratios_are_within_a_point_of_their_targets():
    rows = [row for name, run in finished_runs("pareto", project_root() / "results").items()
            for row in run["metrics"]["rows"] if row["variant"] == "DLR"]
    assert {row["target_skip"] for row in rows} >= {0.2, 0.4, 0.6}
    assert len({row["seed"] for row in rows}) >= 3
    for row in rows:
        assert abs(row["skip"] - row["target_skip"]) <= 0.01, (row["target_skip"], row["seed"], row["skip"])


def test_the_embedded_model_fits_its_room():
    nano = project_root() / "dlr" / "nano"
    files = [p for p in nano.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.parent == nano) <= 16e6
    assert sum(p.stat().st_size for p in files if p.parent != nano) <= 4e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


@pytest.mark.slow
def test_the_shipped_router_meets_its_budget_and_the_dial_on_the_test_split():
    """Within a point where it was calibrated, within two anywhere on the dial, and compact equals masked."""
    model, tokenizer = dlr.from_pretrained(NANO_ROUTER), load_base(RunConfig())[1]
    routing, batches = dlr.routing_of(model), padded_batches(load_documents("embedded", "test"), tokenizer, 256, 16)
    measured = {}
    with torch.no_grad():
        for skip in (0.0, 0.1, 0.25, 0.4, 0.6, 0.8):
            with dlr.budget(model, skip=skip):
                measured[skip] = skip_ratio(evaluate(model, routing, batches, RouterPolicy(), bf16=False, bar=False))
    assert all(abs(found - skip) <= 0.02 for skip, found in measured.items()), measured
    assert abs(measured[0.4] - 0.4) <= 0.01
    assert list(measured.values()) == sorted(measured.values())
