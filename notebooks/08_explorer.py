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
# # 08 · The explorer: what every token costs
#
# **Question.** Which layers does each token of a text run, what does that save, and what does it do to the predictions?
#
# **Method.** One forward pass of the base model and one of the routed model make a *record*; every view below is a
# function of it. Moving the budget only moves the threshold on the router's kept logits, so the plan is redrawn at once;
# losses and times are measured again when the slider rests. The same explorer without JupyterLab:
#
#     python -m dlr explore --serve
#     python -m dlr explore "Any text."

# %% tags=["parameters"]
run_name: str = "default"
checkpoint: str = ""
text: str = ""
skip: float = -1.0
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("explorer", globals())

# %% tags=["nbval-ignore-output"]
from dlr import figures
from dlr.explorer import EXAMPLES, Explorer
from dlr.figures_explorer import token_map
from dlr.runs import Run, results_folder
from dlr.session import open_session

run = Run(results_folder() / "explorer" / config.run_name)
session = open_session(config.checkpoint)
run.start(config.model_dump(), session.name);

# %% [markdown]
# ## Explore
#
# Type a text, choose an example, move the budget. Hover over a token, or Tab to it, for its layers, losses and the five
# likeliest next tokens of both models.

# %% tags=["nbval-ignore-output"]
explorer = Explorer(session=session, text=config.text or EXAMPLES["prose and a name"])
if config.skip >= 0:
    explorer.budget.value = round(100 * config.skip)
    explorer.settle()
explorer.measure()
explorer

# %% [markdown]
# The same as a picture, for pages that do not run widgets:

# %% tags=["nbval-ignore-output"]
picture = token_map(explorer.record)
figures.save(picture, run.folder, "token_map");

# %% [markdown]
# ## Compare
#
# Two budgets, two checkpoints, or the router against the best static plan on the router's own weights. Orange: only the
# first runs the layer; blue: only the second.

# %% tags=["nbval-ignore-output"]
from dlr.explorer_tabs import STATIC, Comparison, Generator

comparison = Comparison(session=session, text=explorer.text.value)
comparison.plan.value = STATIC
comparison

# %% [markdown]
# ## Generate
#
# A continuation token by token, each with its depth; the base model writes its own beside it, step by step in turn, so
# that the two rates are fair.

# %% tags=["nbval-ignore-output"]
Generator(session=session)

# %% [markdown]
# ## This text at other budgets

# %% tags=["nbval-ignore-output"]
import pandas as pd

rows = []
for percent in (0, 20, 40, 60):
    record = session.losses(session.at_skip(explorer.record, percent / 100))
    cost = session.flops(record)
    rows.append({"variant": f"budget {percent} %", "skip": record.skip_ratio, "layers": float(record.active_layers.mean()),
                 "flops": cost.flops_routed / cost.flops_dense, "perplexity": record.perplexity(),
                 "perplexity_dense": record.perplexity("dense"), "kl": float(record.kl.nanmean())})
run.finish(rows, checkpoint=session.name)
pd.DataFrame(rows).round(3)

# %% [markdown]
# ## What it means
#
# One text is an illustration, not a measurement: 04 holds the numbers over many documents, with their intervals and
# controls. Where the columns of the heatmap hardly differ, the router is nearly a static plan, and the comparison shows it.
