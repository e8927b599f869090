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
# **Question.** At 20, 40 and 60 % measured skip, is a token-level router better than the best static plan, and than its
# own shuffled and mean plans?
#
# **Method.** `point="router"` trains one router and one healed static plan at one target and seed; `point="baselines"`
# trains dense LoRA and stochastic depth for a seed; `point="summary"` (the default) reads every finished run and draws
# the frontier. The sweep runs them all:
#
#     python -m dlr sweep params/pareto/nano.yaml

# %% tags=["parameters"]
run_name: str = "default"
point: str = "summary"
model: str = "nano"
dataset: str = "embedded"
target_skip: float = 0.4
dropped: list = [0.2, 0.4, 0.6]
steps: int = 40
eval_docs: int = 160
batch_size: int = 8
seq_len: int = 256
lr: float = 1.0e-3
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("pareto", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr import figures, study
from dlr.runs import Run, finished_runs, project_root, results_folder
from dlr.workbook import results_table, seeds_table

run = Run(results_folder() / "pareto" / config.run_name)
rows, verdict = [], None
if config.point != "summary":
    bench = study.open_bench(config)
    run.start(config.model_dump(), bench.data_hash)

# %% tags=["nbval-ignore-output"]
if config.point == "router":
    variant = study.train(bench, "DLR", config, run.folder / "router")
    rows += study.routed_rows(bench, variant)
    variant.close()
    rows.append(study.static_row(bench, config, run.folder / "static", rows[0]["skip"]))
    verdict = study.against_static(bench, "DLR")
elif config.point == "baselines":
    rows += [study.base_row(bench), study.dense_row(bench, config, run.folder / "dense")]
    rows += study.stochastic_rows(bench, config.model_copy(update={"layer_drop": 0.5}), run.folder / "stochastic",
                                  config.dropped)
if rows:
    run.finish(rows, against_static=verdict)

# %% [markdown]
# ## Result
#
# Mean and standard deviation over seeds.

# %% tags=["nbval-ignore-output"]
root = results_folder()
if not finished_runs("pareto", root):        # nothing swept into this folder: show what came with the repository
    root = project_root() / "results"
table = results_table("pareto", root)
seeds_table(table)

# %% tags=["nbval-ignore-output"]
differences = figures.verdicts(finished_runs("pareto", root))
picture = figures.frontier(table, differences, "Perplexity against measured skip")
figures.save(picture, run.folder if rows else results_folder() / "pareto", "frontier");

# %% [markdown]
# ## DLR against the best static plan
#
# Difference of the mean negative log-likelihood on the same documents, with a paired 95 % bootstrap interval; negative
# favours DLR.

# %% tags=["nbval-ignore-output"]
differences.round(4)

# %% [markdown]
# ## What it means
#
# A router earns its place where its line lies below the best static plan's and the intervals above exclude zero. Where
# they do not, a fixed set of layers does the same work with less machinery, and the table says so.
