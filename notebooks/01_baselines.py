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
# **Question.** What does a LoRA budget buy at full depth, and how far does stochastic depth, the simplest way to train
# for missing layers, carry a model whose layers are then dropped at random?
#
# **Method.** Two LoRA runs on the same data, steps and seed. One runs every layer; the other drops each routable layer
# with probability `layer_drop` per training sequence. Both are evaluated at full depth, the second also with layers
# dropped per token, so that the mismatch between training and evaluation is visible.

# %% tags=["parameters"]
run_name: str = "default"
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

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("baselines", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr import figures, study
from dlr.runs import Run, results_folder, write_atomically

run = Run(results_folder() / "baselines" / config.run_name)
bench = study.open_bench(config)
run.start(config.model_dump(), bench.data_hash)

# %% tags=["nbval-ignore-output"]
rows = [study.base_row(bench)]
rows.append(study.dense_row(bench, config, run.folder / "dense"))
rows += study.stochastic_rows(bench, config, run.folder / "stochastic", config.dropped)

# %% [markdown]
# ## Result
#
# Perplexity on the test split of the corpus, with a 95 % bootstrap interval over documents.

# %% tags=["nbval-ignore-output"]
table = pd.DataFrame(rows)
shown = table[["variant", "skip", "active_layers", "perplexity", "perplexity_low", "perplexity_high"]].round(3)
write_atomically(run.folder / "table.md", shown.to_markdown(index=False) + "\n")
shown

# %% tags=["nbval-ignore-output"]
picture = figures.comparison(table, "Baselines")
figures.save(picture, run.folder, "comparison");

# %%
run.finish(rows);

# %% [markdown]
# ## What it means
#
# The dense LoRA row is the quality ceiling of everything that follows: the same steps, with no layer missing. A routed
# model has to be read against it and against the stochastic-depth rows at the same measured skip, which know nothing
# about the token.
