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
# # 09 · The depth router, before any healing
#
# **Question.** How much of what per-token depth could save does a router capture, from which
# information, and from how many labels?
#
# **Method.** On the untouched base with closed-form skip adapters, a greedy search finds the static
# order, whose prefixes are a nested book of plans. Tokens of training text are labelled with their
# KL from the dense model under every plan; predictors of that harm give each token of the test text
# the plan of least predicted harm + price · units run, at exactly the same skip:
#
# | plan | what it reads |
# |---|---|
# | static | nothing: the best mixture of two plans of the book |
# | depth router | the state after the kept layers, and the position |
# | in context | the same, with further labels from text on which tokens follow the router (`context_tokens` above 0) |
# | position alone, token alone | what their names say |
# | privileged | the dense model's last state: an honest ceiling |
# | oracle | the true harms |
# | shuffled | the depth router's plans, dealt out among the tokens anew |
#
# All plans are *realised*: tokens run with their different plans in one pass. No weight is trained
# but the predictors'.

# %% tags=["parameters"]
run_name: str = ""
model: str = "nano"
dataset: str = "embedded"
budgets: list = [0.15, 0.25, 0.4, 0.5, 0.6]
label_tokens: int = 49152
label_counts: list = [2500, 5000, 10000, 20000, 40000, 80000, 160000]
context_tokens: int = 0
skip_adapter_rank: int = 32
router_hidden: int = 256
eval_docs: int = 48
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("depth_router", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr.figures.depth import depth_kl, label_scaling
from dlr.workbook import depth_study, study
from dlr.workbook.runner import open_run

run = open_run("depth_router", config)
if not run.done:
    depth_study.measure(study.open_bench(config), config, run)

# %% [markdown]
# ## Result

# %% tags=["nbval-ignore-output"]
rows = pd.DataFrame(run.rows)
run.table(rows.pivot(index="plan", columns="budget", values="kl").round(3).reset_index())

# %% [markdown]
# Difference of each plan's KL from the best static plan's (nats a token, paired 95 % interval over
# documents), and the share of the oracle's gain that it captures:

# %% tags=["nbval-ignore-output"]
rows[rows["plan"] != "static"][["budget", "plan", "difference", "difference_low",
                                "difference_high", "captured"]].round(3)

# %% tags=["nbval-ignore-output"]
run.figure(depth_kl(run.rows, f"{config.model}, not healed"), "depth_kl")

# %% [markdown]
# ## How many labels it takes

# %% tags=["nbval-ignore-output"]
run.figure(label_scaling(run.metrics["scaling"], f"{config.model}, not healed"), "label_scaling")

# %% [markdown]
# ## What it means

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.depth_router(run.rows, run.metrics))
