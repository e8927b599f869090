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
# # 05 · Benchmarks: what skipping costs on tasks
#
# **Question.** How do routed, static, stochastic and dense models score on standard tasks, and what
# did the router really skip on the tokens that were scored?
#
# **Method.** lm-evaluation-harness with its own prompts, metrics and few-shot examples. A routed
# row on which the router did not run on every request is an error. Skip is measured on scored
# tokens; padding and prompts are counted apart. A static plan runs each task at the skip that the
# router it is matched with had on that very task.
#
# The defaults need neither network nor files: the embedded model, its router, and the static plan
# found beside that router, on the embedded corpus. Any task of the harness can be named, and any
# checkpoint be a row:
#
#     python -m dlr run evaluation --set tasks=[blimp,arc_challenge] --set data_dir=DIR
#
# Where `agreement_docs` is above 0, every row but the base also writes freely: the openings of so
# many documents (of `dataset`) are continued greedily, and the text is held against the base
# model's own. How many tokens agree, the KL a token along the base's text and along the row's own,
# and the skip while generating are columns of the table; a matched static plan runs at the router's
# skip. All texts are `agreement_tokens` long: none stops early.
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
phase: str = ""
variants: list = [
    {"name": "router", "checkpoint": "nano-router"},
    {"name": "static plan", "checkpoint": "nano-router", "variant": "static", "match": "router"}]
model: str = "nano"
tasks: list = ["embedded"]
limit: float = 40.0
data_dir: str = ""
batch_size: int = 16

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("evaluation", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr.workbook import evaluation
from dlr.figures.benchmarks import (agreements, bars, group_tasks, groups, layer_skips,
                                    scatter)
from dlr.runs import Run, project_root
from dlr.bench.table import environment, scores_table
from dlr.workbook.runner import open_run

run = open_run("evaluation", config)

# %% [markdown]
# Each task is kept as soon as it is finished (`tasks/<variant>/<task>.json`); an interrupted run
# goes on from there.

# %% tags=["nbval-ignore-output"]
if not run.done:
    rows, harness, differences = evaluation.evaluate_variants(config, run.folder)
    run.finish(rows, against_static=differences, environment=environment(), tasks=config.tasks,
               limit=config.limit, num_fewshot=config.num_fewshot, harness=harness)
rows = run.rows
harness = run.metrics["harness"]
run.table(scores_table(rows))

# %% [markdown]
# ## Scores
#
# Bars are 95 % intervals; the dotted line is what guessing gives. A row that is not above chance is
# marked in the table, and so is the number of a group's tasks that are not.

# %% tags=["nbval-ignore-output"]
run.figure(bars(rows), "scores")

# %% tags=["nbval-ignore-output"]
run.figure(scatter(rows), "score_against_skip")
run.figure(agreements(rows), "agreement")

# %% [markdown]
# A group's mean hides where a model is right, at chance, or systematically wrong: every task of
# every group.

# %% tags=["nbval-ignore-output"]
for group in groups(rows):
    run.figure(group_tasks(rows, harness, group), f"tasks_{group}")

# %% [markdown]
# ## Which layers were skipped on the scored tokens

# %% tags=["nbval-ignore-output"]
run.figure(layer_skips(rows), "layers")
skips = pd.DataFrame(rows)[["variant", "skip", "context_skip"]]
skips.rename(columns={"skip": "scored tokens", "context_skip": "prompts"})

# %% [markdown]
# ## What it means
#
# A router earns its place on a task where its score lies above the matched static plan's and the
# paired interval excludes zero. Where a row is at chance, the task says nothing about routing at
# this size of model.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.evaluation(rows, run.metrics["against_static"]))

# %% [markdown]
# ## The recorded comparison on BLiMP
#
# All 67,000 pairs, on checkpoints of the frontier sweep (notebook 04), which are not in the
# repository. What is recorded here is of the first method's routers (independent gates), which that
# sweep trained before there were depth routers; the commands now make the comparison for those:
#
#     python -m dlr sweep params/pareto/nano.yaml
#     python -m dlr run evaluation --params params/evaluation/nano.yaml --set data_dir=DIR

# %% tags=["nbval-ignore-output"]
recorded = Run(project_root() / "results" / "evaluation" / "nano", reused=True)
if recorded.done:
    display(scores_table(recorded.rows))
    group_tasks(recorded.rows, recorded.metrics["harness"], "blimp")

# %% tags=["nbval-ignore-output"]
Markdown(findings.evaluation(recorded.rows, recorded.metrics["against_static"])
         if recorded.done else "This copy of the project does not hold it.")
