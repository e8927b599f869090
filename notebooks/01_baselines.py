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
# # 01 · Baselines: static LoRA and stochastic depth
#
# **Question.** What does a LoRA budget buy at full depth, and how far does stochastic depth, the
# simplest way to train for missing layers, carry a model whose layers are then dropped at random?
#
# **Method.** Two LoRA runs on the same data, steps and seed. One runs every layer; the other drops
# each routable layer with probability `layer_drop` per training sequence. Both are evaluated at
# full depth, the second also with layers dropped per token, so that the mismatch between training
# and evaluation is visible.
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
layer_drop: float = 0.5
dropped: list = [0.2, 0.4, 0.6]
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

config = notebook_settings("baselines", globals())

# %% tags=["nbval-ignore-output"]
from dlr.workbook import study
from dlr.figures.training import comparison
from dlr.workbook.runner import open_run, shown

run = open_run("baselines", config)

# %% tags=["nbval-ignore-output"]
if not run.done:
    bench = study.open_bench(config)
    rows = [study.base_row(bench), study.dense_row(bench, config, run.folder / "dense")]
    rows += study.stochastic_rows(bench, config, run.folder / "stochastic", config.dropped)
    run.finish(rows)

# %% [markdown]
# ## Result
#
# Perplexity on the test split of the corpus, with a 95 % bootstrap interval over documents.

# %% tags=["nbval-ignore-output"]
run.table(shown(run.rows))

# %% tags=["nbval-ignore-output"]
run.figure(comparison(run.rows, "Baselines"), "comparison")

# %% [markdown]
# ## What it means
#
# The dense LoRA row is the quality ceiling of everything that follows: the same steps, with no
# layer missing. A routed model has to be read against it and against the stochastic-depth rows at
# the same measured skip, which know nothing about the token.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.baselines(run.rows))
