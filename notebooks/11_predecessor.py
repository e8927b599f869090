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
# # 11 · Beside the predecessor, on its own protocol
#
# **Question.** On the data, optimizer and metric of the predecessor of this workbook, what do its
# rows give, and what do the two rows give that it lacks: the best static plan, and a depth router?
#
# **Method.** The text is the first 300 lines of WikiText-103's training text that have more than 100
# characters, joined by blank lines and cut into blocks of 128 tokens, the last 50 of which are held
# out. 150 steps of 4 blocks, AdamW at 2e-4 with a cosine schedule, LoRA of rank 8. A row is one
# `point` and one seed:
#
# | point | what is trained | loss |
# |---|---|---|
# | base | nothing | |
# | dense | LoRA on the attention's projections | cross-entropy |
# | stochastic | the same; each layer is left out of a whole batch with chance `target_skip` | cross-entropy + distillation |
# | router | the predecessor's router on the raw state after the first layers, with gates straight through and without noise, and LoRA on all projections | the same + squared distance to the target |
# | depth_router | a depth router regressed on harm labels, with skip adapters, then LoRA on all projections; and the same for the best static plan | cross-entropy |
#
# The predecessor's distillation is a sum over 128 positions. Divided by the sum of both weights it is
# `kd_weight` 0.9624, and its weights 400, 800 and 1600 at the target are `target_weight` 15.0, 30.1
# and 60.2. Its small penalty on the mean gate (0.0004 on that scale) is left out.
#
# **Measured** are the first 50 paragraphs of the validation text, each alone and padded to 128 tokens.
# The table names both averages and both skips:
#
# * `perplexity` is over tokens; `perplexity_batches` is the predecessor's: the exponential of the mean
#   over batches of 8, in which the last batch of 2 counts as much as one of 8;
# * `skip` is over real tokens; `skip_padded` is the predecessor's, over all positions. A fifth of them
#   is padding, on which a router decides as well.
#
# The predecessor evaluates stochastic depth, and "random" plans, under one mask that a seed draws once.
# `masks` names those layers: a static plan that nobody chose.
#
#     python -m dlr sweep params/predecessor/smollm2.yaml
#
# `point="summary"` (the default) reads every finished point. It writes nothing.

# %% tags=["parameters"]
run_name: str = ""
point: str = "summary"
model: str = "HuggingFaceTB/SmolLM2-135M"
dataset: str = "wikitext-103-raw-v1"
steps: int = 150
seed: int = 42

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("predecessor", globals())

# %% tags=["nbval-ignore-output"]
from dlr.figures import predecessor as beside
from dlr.runs import Run, alike, finished_runs, project_root, results_folder
from dlr.workbook import predecessor
from dlr.workbook.runner import open_run

run = None if config.point == "summary" else open_run("predecessor", config)
if run is not None and not run.done:
    predecessor.measure(config, run)

# %% tags=["nbval-ignore-output"]
run.table(beside.over_seeds(beside.table_of({"run": run}))) if run is not None else None

# %% [markdown]
# ## Result
#
# Means over seeds of the finished points, of each model and number of steps. `to_base` and `to_dense`
# are ratios of `perplexity_batches`: models differ, and so do their bases.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown, display

root = results_folder()
if not finished_runs("predecessor", root):   # nothing here: show what came with the repository
    root = project_root() / "results"
found = {name: Run(root / "predecessor" / name) for name in finished_runs("predecessor", root)}
groups = alike(found)
tables = {group: beside.table_of(runs) for group, runs in groups.items()}
for (name, _, count), table in tables.items():
    display(Markdown(f"**{name}, {count} steps**"), beside.over_seeds(table).round(3))

# %% [markdown]
# As the predecessor published it, of seed 42 (weight 400 at the target after 150 steps, 1600 after
# 500):

# %% tags=["nbval-ignore-output"]
beside.published().round(3)

# %% tags=["nbval-ignore-output"]
ours = {f"{name}, {count} steps": table for (name, _, count), table in tables.items()
        if "to_dense" in table}
for title, table in (ours or {"as published": None}).items():
    beside.ratios(table, title)

# %% [markdown]
# ## What it means
#
# Ratios can be compared between models, perplexities cannot. The published skips count padding, and
# the published stochastic rows are one mask.

# %% tags=["nbval-ignore-output"]
from dlr.workbook import findings

Markdown("\n\n".join(findings.predecessor(table) for table in tables.values()))
