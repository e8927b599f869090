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
# # 10 · Stage by stage
#
# **Question.** What does each stage of the method add over the one before?
#
# **Method.** Five stages, each measured at every budget on the same test documents, and compared
# with the stage before by a paired difference:
#
# | stage | what is new |
# |---|---|
# | closed form | the best static plan, with skip adapters by ridge regression; nothing is trained |
# | regressed | a depth router, fitted to harm labels of the base, gives each token its plan |
# | in context | its labels are joined by those of text on which tokens follow the router |
# | healed | LoRA and adapters are trained under the router's plans, at a random budget a sequence |
# | end to end | the router is trained too: one Gumbel straight-through choice of a plan a token |
#
# The last two both start from the labels in context and take the same steps: the last stands in the
# place of the one before. The documents are those of notebook 04.

# %% tags=["parameters"]
run_name: str = ""
model: str = "nano"
dataset: str = "embedded"
budgets: list = [0.2, 0.4, 0.6]
steps: int = 40
label_tokens: int = 49152
context_tokens: int = 16384
learning_share: float = 1.0
router_lr: float = 1.0e-3
eval_docs: int = 160
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("stages", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr.figures.stages import STAGES, stage_gains
from dlr.workbook import stages, study
from dlr.workbook.runner import open_run

run = open_run("stages", config)
if not run.done:
    stages.measure_stages(study.open_bench(config), config, run)

# %% [markdown]
# ## Result
#
# Perplexity on the test documents, by stage and budget:

# %% tags=["nbval-ignore-output"]
rows = pd.DataFrame(run.rows)
table = rows.pivot(index="stage", columns="target_skip", values="perplexity")
run.table(table.reindex([stage for stage in STAGES if stage in table.index]).round(3)
          .reset_index())

# %% [markdown]
# Loss of each stage less that of the stage before (nats a token, paired 95 % interval over
# documents; negative: the stage helps):

# %% tags=["nbval-ignore-output"]
gains = pd.DataFrame(run.metrics["gains"])
gains.round(4)

# %% tags=["nbval-ignore-output"]
run.figure(stage_gains(run.metrics["gains"], f"{config.model} on {config.dataset}"), "stage_gains")
