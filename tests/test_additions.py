"""Each of the additions that dlr/CONTRIBUTING.md shows is one file: made in a copy, and run there."""

import json
import re
import subprocess
import sys

import jupytext
import pytest
from clone import contents, copy_project, environment

from dlr.runs import project_root

PAGE = (project_root() / "dlr" / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))
FILES = {"objective": "dlr/train/objectives.py", "router": "dlr/routing/router_stepwise.py",
         "family": "dlr/routing/families.py", "figure": "dlr/figures/skips.py",
         "phase": "dlr/workbook/phases/idea.py"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp("copy"))
    before = contents(folder)
    for name, place in FILES.items():
        path = folder / place
        old = path.read_text(encoding="utf-8") + "\n\n" if path.is_file() else ""
        path.write_text(old + EXAMPLES[name], encoding="utf-8")
    changed = {name for name, digest in contents(folder).items() if digest != before[name]}
    assert changed == {FILES["objective"], FILES["family"]}, "an addition is one file"
    return folder


def python(copy, program: str) -> str:
    """What a program prints in the copy."""
    answer = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True,
                            text=True, env=environment(copy))
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


TINY = """
import sys, warnings, torch
sys.path.insert(0, "tests")
from tiny_models import Renamed, tiny
import dlr
"""


def test_an_objective_trains(copy):
    terms = python(copy, """
from types import SimpleNamespace
import torch
from dlr.train.objectives import OBJECTIVES, Objective
from dlr.train.settings import RunConfig
config = RunConfig(objective="squared", target_skip=0.4, weights={"distance": 2.0})
objective = OBJECTIVES["squared"](config)
print(float(objective.term(SimpleNamespace(budget=torch.tensor(0.5)))))
assert float(Objective(config).term(SimpleNamespace(gates=torch.ones(1)))) == 0, "a control's"
assert config.changed(objective="original").weights == {}
assert config.changed(seed=3).weights == {"distance": 2.0}
try:
    RunConfig(objective="squared", weights={"distance": -1.0})
except ValueError as error:
    print("refused:", "distance" in str(error))
""").splitlines()
    assert float(terms[0]) == pytest.approx(2.0 * 0.1**2)
    assert terms[1] == "refused: True"


def test_a_router_decides_layer_by_layer_and_is_refused_for_compact(copy):
    told = python(copy, TINY + """
config = dlr.RouterConfig(router_class="Stepwise", always_keep=2, keep_first_tokens=0)
try:
    dlr.attach(tiny(), config, execution="compact")
except dlr.NotRoutable as error:
    print(error)
torch.manual_seed(0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = tiny()
    routing = dlr.attach(model, config)
    with torch.no_grad():
        model(torch.arange(2, 30)[None])
print(routing.plan.gates.shape[-1], routing.plan.skip_ratio)
""").splitlines()
    assert "compact" in told[0] and "layer" in told[0]
    units, skip = told[1].split()
    assert units == "4" and 0 < float(skip) < 1


def test_a_family_with_other_names_runs_compacted(copy):
    python(copy, TINY + """
from dlr.routing.compact import OVERHEAD
from dlr.routing.families import names
OVERHEAD["cpu"] = 0.0

assert "thinker" in names("mlp") and "thought_proj" in names("lora")
model = tiny()
for index, layer in enumerate(model.model.layers):
    model.model.layers[index] = Renamed(layer)
routing = dlr.attach(model, dlr.RouterConfig(always_keep=2, keep_first_tokens=0), "compact")
with torch.no_grad():
    routing.router.net[-1].weight.normal_(std=2.0)
    routing.router.net[-1].bias.zero_()
    ids = torch.arange(2, 30)[None]
    compact = model(ids).logits
    assert routing.plan.compact and 0 < routing.plan.skip_ratio < 1
    with routing.at(execution="masked"):
        assert torch.allclose(compact, model(ids).logits, atol=1e-5)
""")


def test_a_figure_is_drawn_by_the_command(copy):
    python(copy, """
from pathlib import Path
from dlr.figures.register import redraw
paths = redraw(Path("results/baselines/default"), Path("drawn"))
assert Path("drawn/skips_default.png") in paths, paths
""")
    assert (copy / "drawn" / "skips_default.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_phase_runs_from_the_command_line(copy):
    for ending in (".py", ".ipynb"):
        head = '# ---\n# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n# ---\n\n'
        notebook = jupytext.reads(head + EXAMPLES["notebook"], "py:percent")
        jupytext.write(notebook, copy / "notebooks" / f"09_idea{ending}")
    answer = subprocess.run([sys.executable, "-m", "dlr", "run", "idea", "--set", "tokens=32"],
                            cwd=copy, capture_output=True, text=True, env=environment(copy))
    assert answer.returncode == 0, answer.stderr[-3000:]
    metrics = next((copy / "results" / "idea").glob("*/metrics.json"))
    assert json.loads(metrics.read_text(encoding="utf-8"))["rows"][0]["tokens"] == 32
