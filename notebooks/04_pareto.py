# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · The frontier: quality against layers run
#
# **Question.** At 20, 40 and 60 % measured skip, is one depth router better than the best static
# plan, and than its own shuffled, mean and random plans?
#
# **Method.** A depth router predicts the harm of each plan of a nested book for a token, and the
# token takes the plan with the least harm + price · layers run: one router serves every budget by
# its price. `point="router"` trains one router and one static plan of a seed, both with skip
# adapters and both elastically (each sequence at a depth of its own), and measures them at every
# budget; `point="baselines"` trains dense LoRA and stochastic depth for a seed;
# `point="checkpoint"` measures a router that is there already; `point="summary"` (the default) reads
# every finished run and draws the frontier. The sweep runs them all:
#
#     python -m dlr sweep params/pareto/nano.yaml
#
# Perplexities of one model differ from notebook to notebook, since the text does: windows of 512
# tokens of whole test documents in 00, the first 256 tokens of 160 test documents in 01 to 04, 40
# whole test documents under a window of 512 tokens that moves by 256 in 05, and the first 192
# tokens of 96 test documents in 07.
#
# A point that is recorded already is shown; any other goes to `results/scratch/`, or to a folder of
# its own if `run_name` is given one. The summary writes nothing; `python -m dlr.figures` keeps its
# figure.

# %% tags=["parameters"]
run_name: str = ""
point: str = "summary"
model: str = "nano"
dataset: str = "embedded"
budgets: list = [0.2, 0.4, 0.6]
steps: int = 40
eval_docs: int = 160
batch_size: int = 8
seq_len: int = 256
lr: float = 1.0e-3
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("pareto", globals())

# %% tags=["nbval-ignore-output"]
from dlr.workbook import frontier as points
from dlr.workbook import study
from dlr.figures.training import frontier, verdicts
from dlr.runs import Run, alike, finished_runs, project_root, results_folder
from dlr.workbook.runner import comparable, open_run, results_table, seeds_table, shown

run = None if config.point == "summary" else open_run("pareto", config)

# %% tags=["nbval-ignore-output"]
if run is not None and not run.done:
    points.MEASURES[config.point](study.open_bench(config), config, run)

# %% tags=["nbval-ignore-output"]
run.table(shown(run.rows)) if run is not None else None

# %% [markdown]
# ## Result
#
# Mean and standard deviation over seeds, of the finished runs of this model, dataset and number of
# steps.

# %% tags=["nbval-ignore-output"]
root = results_folder()
if not finished_runs("pareto", root):   # nothing swept here: show what came with the repository
    root = project_root() / "results"
found = {name: Run(root / "pareto" / name) for name in finished_runs("pareto", root)}
runs = alike(found).get((config.model, config.dataset, config.steps), {})
table = comparable(results_table("pareto", root, runs))
seeds_table(table)

# %% tags=["nbval-ignore-output"]
differences = verdicts(runs)
if runs:
    frontier(table, differences, "Perplexity against measured skip")

# %% [markdown]
# ## DLR against the best static plan
#
# Difference of the mean negative log-likelihood on the same documents, with a paired 95 % bootstrap
# interval; negative favours DLR.

# %% tags=["nbval-ignore-output"]
differences.round(4)

# %% [markdown]
# ## What it means
#
# A router earns its place where its line lies below the best static plan's and the intervals above
# exclude zero. Where they do not, a fixed set of layers does the same work with less machinery.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.frontier(differences))
