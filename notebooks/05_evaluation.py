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
# **Question.** How do routed, static, stochastic and dense models score on standard tasks, and what did the router really
# skip on the tokens that were scored?
#
# **Method.** lm-evaluation-harness with its own prompts, metrics and few-shot examples. A routed row on which the router
# did not run on every request is an error. Skip is measured on scored tokens; padding and prompts are counted apart. A
# static plan runs each task at the skip that the router it is matched with had on that very task.
#
#     python -m dlr run evaluation --params params/evaluation/nano.yaml --set data_dir=DIR

# %% tags=["parameters"]
run_name: str = "default"
phase: str = ""
variants: list = []
model: str = "nano"
tasks: list = ["embedded"]
limit: float = 40.0
data_dir: str = ""
batch_size: int = 16

# %%
import sys

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("evaluation", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr import figures, figures_evaluation
from dlr.benchmark import evaluate_variants, recorded
from dlr.evalcommand import environment, scores_table
from dlr.runs import Run, results_folder

run = Run(results_folder() / "evaluation" / config.run_name)
run.start(recorded(config), "")

# %% [markdown]
# Each task is kept as soon as it is finished (`tasks/<variant>/<task>.json`); an interrupted run goes on from there.

# %% tags=["nbval-ignore-output"]
rows, harness, differences = evaluate_variants(config, run.folder)
run.finish(rows, against_static=differences, environment=environment(), tasks=config.tasks, limit=config.limit,
           num_fewshot=config.num_fewshot, harness=harness)
table = scores_table(rows)
(run.folder / "table.md").write_text(table.to_markdown(index=False) + "\n", encoding="utf-8")
table

# %% [markdown]
# ## Scores
#
# Bars are 95 % intervals; the dotted line is what guessing gives. A row that is not above chance is marked in the table,
# and so is the number of a group's tasks that are not.

# %% tags=["nbval-ignore-output"]
figures.save(figures_evaluation.bars(rows), run.folder, "scores");

# %% tags=["nbval-ignore-output"]
figures.save(figures_evaluation.scatter(rows), run.folder, "score_against_skip");

# %% [markdown]
# A group's mean hides where a model is right, at chance, or systematically wrong: every task of every group.

# %% tags=["nbval-ignore-output"]
for group in figures_evaluation.groups(rows):
    figures.save(figures_evaluation.group_tasks(rows, harness, group), run.folder, f"tasks_{group}")

# %% [markdown]
# ## Which layers were skipped on the scored tokens

# %% tags=["nbval-ignore-output"]
picture = figures_evaluation.layer_skips(rows)
if picture is not None:
    figures.save(picture, run.folder, "layers")
skips = [{"variant": r["variant"], "scored tokens": r["skip"], "prompts": r["context_skip"]} for r in rows]
pd.DataFrame(skips)

# %% [markdown]
# ## The router against the best static plan, on the same items
#
# Mean accuracy over tasks, router minus static plan at the same measured skip, with a paired 95 % interval; positive
# favours the router.

# %% tags=["nbval-ignore-output"]
pd.DataFrame(differences).round(4)

# %% [markdown]
# ## Tasks that are not above chance

# %% tags=["nbval-ignore-output"]
below = [{"variant": r["variant"], "of": s["task"], "tasks": ", ".join(s.get("tasks_not_above_chance") or [s["task"]])}
         for r in rows for s in r["scores"] if s.get("tasks_not_above_chance") or s.get("above_chance") is False]
pd.DataFrame(below)

# %% [markdown]
# ## What it means
#
# A router earns its place on a task where its score lies above the matched static plan's and the paired interval excludes
# zero. Where a row is at chance, the task says nothing about routing at this size of model.
