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
# # 02 · Sequence-level routing
#
# **Question.** If one plan serves a whole sequence, what does a global price on layers buy?
#
# **Method.** The router reads the mean state of the first `pool_tokens` tokens (which run every
# layer themselves) and decides one plan for the rest, so that no later token has a say in how an
# earlier one is computed. One run for each penalty $\lambda$; the loss is $(1-w)\,\mathrm{CE} +
# w\,\mathrm{KD} + \lambda \cdot \text{mean gate}$. There is no target: where the skip ratio ends up
# is a result.
#
# Perplexities of one model differ from notebook to notebook, since the text does: windows of 512
# tokens of whole test documents in 00, the first 256 tokens of 160 test documents in 01 to 04, 40
# whole test documents under a window of 512 tokens that moves by 256 in 05, and the first 192
# tokens of 96 test documents in 07.
#
# A run of these settings that is recorded already is shown; any other goes to `results/scratch/`,
# or to a folder of its own if `run_name` is given one.

# %% tags=["parameters"]
run_name: str = ""
model: str = "nano"
dataset: str = "embedded"
penalties: list = [0.3, 1.0, 3.0]
steps: int = 40
eval_docs: int = 160
batch_size: int = 8
seq_len: int = 256
router_lr: float = 1.0e-2
lr: float = 1.0e-3
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("sequence_routing", globals())

# %% tags=["nbval-ignore-output"]
from dlr.workbook import study
from dlr.figures.training import comparison, training
from dlr.routing.policy import RouterPolicy
from dlr.workbook.runner import open_run, shown

run = open_run("sequence_routing", config)
folders = {f"lambda = {price:g}": f"lambda-{price:g}" for price in config.penalties}

# %% tags=["nbval-ignore-output"]
if not run.done:
    bench = study.open_bench(config)
    rows = [study.base_row(bench), study.dense_row(bench, config, run.folder / "dense")]
    for price, (name, folder) in zip(config.penalties, folders.items()):
        variant = study.train(bench, name, config.changed(penalty=price), run.folder / folder)
        rows.append(study.measure(bench, variant, name, RouterPolicy()))
        variant.close()
    run.finish(rows)

# %% [markdown]
# ## Result

# %% tags=["nbval-ignore-output"]
run.table(shown(run.rows))

# %% tags=["nbval-ignore-output"]
run.figure(comparison(run.rows, "Sequence-level routing under a global penalty"), "comparison")

# %% tags=["nbval-ignore-output"]
title = "A price is no budget: where skip ends is a result"
run.figure(training(run.logs(folders), title), "training")

# %% [markdown]
# ## What it means

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.sequence(run.rows))
