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
# **Question.** Is the model that travels with this repository a fair instrument: does it predict text it has not seen,
# and does each of its layers do something?
#
# **Method.** `stage="stable"` pretrains at a constant rate and resumes from its newest checkpoint, for as long as there
# is time; `stage="decay"` takes that checkpoint to a rate of zero; `stage="export"` writes the result to `dlr/nano/` in
# bfloat16. `stage="report"` (the default) measures what is there:
#
#     python -m dlr run base_model --params params/base_model/stable.yaml --set text_dir=FOLDER
#     python -m dlr run base_model --params params/base_model/decay.yaml --set text_dir=FOLDER
#     python -m dlr run base_model --params params/base_model/export.yaml

# %% tags=["parameters"]
run_name: str = "default"
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

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("base_model", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr import basemodel, figures
from dlr.runs import Run, results_folder

run = Run(results_folder() / "base_model" / config.run_name)
run.start(config.model_dump(), "embedded+text_dir")

# %% tags=["nbval-ignore-output"]
if config.stage in ("stable", "decay"):
    history = basemodel.train_stage(config)
elif config.stage == "export":
    history = basemodel.export(config)
else:
    history = basemodel.training_history()

# %% [markdown]
# ## Pretraining

# %% tags=["nbval-ignore-output"]
if len(history):
    picture = figures.pretraining(history)
    figures.save(picture, run.folder, "pretraining");

# %% [markdown]
# ## Bits per byte on text it was not trained on

# %% tags=["nbval-ignore-output"]
model, tokenizer = basemodel.load_for_report(config)
scores = pd.DataFrame(basemodel.bits_per_byte(model, tokenizer, config))
scores.round(3)

# %% [markdown]
# ## What each layer is worth
#
# Loss added on the embedded corpus's test split when a single layer is skipped.

# %% tags=["nbval-ignore-output"]
harm = basemodel.layer_harm(model, tokenizer, config)
picture = figures.layer_harm(harm)
figures.save(picture, run.folder, "layer_harm");

# %% [markdown]
# ## A few continuations

# %% tags=["nbval-ignore-output"]
samples = basemodel.continuations(model, tokenizer, config.seed)
for sample in samples:
    print(sample, end="\n---\n")

# %%
run.finish(scores.to_dict("records"), layer_harm=harm, samples=samples, history=history.to_dict("records"));

# %% [markdown]
# ## What it means
#
# A layer whose bar is near zero is slack: skipping it costs nothing, for any token, and a static plan will find it. A
# model with many slack layers flatters static plans. `dlr/nano/README.md` says how many tokens this one has seen.
