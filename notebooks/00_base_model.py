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
# # 00 · The embedded base model
#
# **Question.** Is the model that travels with this repository a fair instrument: does it predict
# text it has not seen, and does each of its layers do something?
#
# **Method.** `stage="stable"` pretrains at a constant rate and resumes from its newest checkpoint,
# for as long as there is time; `stage="decay"` takes that checkpoint to a rate of zero;
# `stage="export"` writes the result to `dlr/nano/` in bfloat16. `stage="report"` (the default)
# measures what is there:
#
#     python -m dlr run base_model --params params/base_model/stable.yaml --set text_dir=FOLDER
#     python -m dlr run base_model --params params/base_model/decay.yaml --set text_dir=FOLDER
#     python -m dlr run base_model --params params/base_model/export.yaml
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
stage: str = "report"
work_dir: str = "base-model"
text_dir: str = ""
dataset: str = ""
wikitext_test: str = ""
tinystories_validation: str = ""
eval_docs: int = 240
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("base_model", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr.base.models import load_base
from dlr.workbook import base_model
from dlr.figures.training import layer_harm, pretraining
from dlr.workbook.runner import open_run

run = open_run("base_model", config)

# %% [markdown]
# ## Measuring
#
# The loss history of the training, bits per byte, the loss that each single layer's absence adds,
# and a few continuations.

# %% tags=["nbval-ignore-output"]
if not run.done:
    history = base_model.history_of(config)
    base, tokenizer = load_base()
    scores = base_model.bits_per_byte(base, tokenizer, config)
    harm = base_model.layer_harm(base, tokenizer, config)
    samples = base_model.continuations(base, tokenizer, config.seed)
    run.finish(scores, layer_harm=harm, samples=samples, history=history.to_dict("records"))

# %% [markdown]
# ## Pretraining

# %% tags=["nbval-ignore-output"]
history = pd.DataFrame(run.metrics["history"])
if len(history):
    run.figure(pretraining(history), "pretraining")

# %% [markdown]
# ## Bits per byte on text it was not trained on

# %% tags=["nbval-ignore-output"]
pd.DataFrame(run.rows).round(3)

# %% [markdown]
# ## What each layer is worth
#
# Loss added on the embedded corpus's test split when a single layer is skipped.

# %% tags=["nbval-ignore-output"]
run.figure(layer_harm(run.metrics["layer_harm"]), "layer_harm")

# %% [markdown]
# ## A few continuations

# %% tags=["nbval-ignore-output"]
for sample in run.metrics["samples"]:
    print(sample, end="\n---\n")

# %% [markdown]
# ## What it means
#
# A layer whose bar is near zero is slack: skipping it costs nothing, for any token, and a static
# plan will find it. A model with many slack layers flatters static plans. `dlr/nano/README.md` says
# how many tokens this one has seen.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.base_model(run.rows, run.metrics["layer_harm"]))
