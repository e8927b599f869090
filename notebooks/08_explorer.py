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
# **Question.** Which layers does each token of *this* text run, what does skipping the others cost
# it, and how does that change with the budget?
#
# **Method.** A routed model reads the text twice, dense and routed; everything on screen is a
# function of that record. Shade and number are the layers a token ran; hover over a token, or move
# to it with Tab, for its losses and what both models predict next. The budget slider re-routes from
# the kept logits at once; losses and times follow when it rests. The same without JupyterLab:
#
#     python -m dlr explore "Any text."
#     python -m dlr explore --serve

# %% tags=["parameters"]
run_name: str = ""
checkpoint: str = ""
text: str = ""
skip: float = -1.0
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("explorer", globals())

# %% [markdown]
# ## The live view
#
# Three tabs: *Explore* one text; *Compare* two budgets, two checkpoints, or the router with its
# best static plan; *Generate* a continuation and watch each token's depth as it comes.

# %% tags=["nbval-ignore-output"]
from dlr.explore.tabs import Workbench

workbench = Workbench(config.checkpoint or None, config.text or None, **config.loading)
explorer = workbench.explorer
if config.skip >= 0:
    explorer.budget.value = round(100 * config.skip)
    explorer.settle()
workbench

# %% [markdown]
# ## The same view as a picture
#
# For pages that show no widgets, and for papers; *Export* writes it as PNG and PDF, beside a
# self-contained HTML page and the record as CSV and JSON.

# %% tags=["nbval-ignore-output"]
from dlr.explore.picture import token_map

picture = token_map(explorer.record)

# %% tags=["nbval-ignore-output"]
record = explorer.record
print(f"{explorer.session.name}: {100 * record.skip_ratio:.1f} % skipped, "
      f"{float(record.active_layers.mean()):.2f} layers a token, "
      f"perplexity {record.perplexity():.2f} routed, {record.perplexity('dense'):.2f} dense, "
      f"{len(record)} tokens")

# %% [markdown]
# ## What it means
#
# One text is an anecdote: notebook 07 tells what holds over many. What to look for here: layers
# that are pale for every token are a static plan; columns of different height are where the router
# looks at the token; and a token whose routed loss stands far above its dense one is where the
# budget was spent badly.
