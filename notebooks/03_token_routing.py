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
# # 03 · Token-level routing
#
# **Question.** Which training makes a token-level router hit its budget, and does it then beat
# plans that do not look at the token?
#
# **Method.** All variants share base, data, steps, skip adapters, LoRA's rank and seed.
#
# | variant | objective | what is trained |
# |---|---|---|
# | v1 | cross-entropy, distillation and one global penalty on the mean gate | independent gates and LoRA, by gradients |
# | v2 | the original objective: per-layer L1, summed, and a squared target term | the same |
# | cold | controlled budget (the threshold is the dual variable) | the same, from nothing, end to end |
# | DLR | the default: a depth router regressed on harm labels (notebook 09), whose plan stays put | LoRA and skip adapters by gradients |
# | DLR without KD | the default with cross-entropy alone | as DLR |
#
# DLR's router gets no gradient here (`router_share` above 0 trains it further; notebook 10 measures
# that).
#
# Published rules can be asked for by name in `variants`, each on the same base, data and steps
# (`dlr/routing/router_*.py` say what is simplified): **MoD** (a layer picks its best k tokens of
# the sequence, so that it is *not causal*), **D-LLM** (a gate a layer that reads the current state,
# L1 to the target for each token), **SkipGPT** (attention and MLP gated apart; no skip adapters),
# **FlexiDepth** (soft weights on layer and adapter), **ShortGPT** (static, by the similarity of a
# layer's input and output).
#
# Every controlled router is calibrated on held-out text and measured on the test split, beside its
# own plan shuffled across tokens, its mean plan, a random plan at the same skip, and the best
# static plan healed by the same LoRA budget.
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
model: str = "nano"
dataset: str = "embedded"
target_skip: float = 0.4
variants: list = ["v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"]
steps: int = 40
eval_docs: int = 160
batch_size: int = 8
accumulation: int = 1
seq_len: int = 256
lr: float = 1.0e-3
kd_weight: float = 0.5
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.settings import SettingsError
from dlr.workbook.peers import PEERS, STATIC, VERSIONS, of_variant, shortgpt_row
from dlr.workbook.runner import notebook_settings

config = notebook_settings("token_routing", globals())
routers = [*VERSIONS, *PEERS]
known = [*routers, STATIC, "best static", "dense LoRA"]
unknown = [name for name in config.variants if name not in known]
if unknown:
    raise SettingsError(f"variants={unknown} are none of {known}")
configs = {name: of_variant(config, name) for name in routers if name in config.variants}

# %% tags=["nbval-ignore-output"]
from dlr.workbook import frontier, study
from dlr.runs import kind_of
from dlr.figures.training import comparison, keep_rates, training
from dlr.workbook.runner import open_run, shown

run = open_run("token_routing", config)
folders = {name: name.replace(" ", "-") for name in configs}

# %% tags=["nbval-ignore-output"]
if not run.done:
    bench = study.open_bench(config)
    rows = [study.base_row(bench)]
    for name, changed in configs.items():
        variant = study.train(bench, name, changed, run.folder / folders[name])
        rows += study.routed_rows(bench, variant)
        variant.close()
    skips = [row["skip"] for row in rows if row["kind"] == "routed" and row["of"] == "DLR"]
    skip = skips[0] if skips else config.target_skip
    if "best static" in config.variants:
        rows.append(study.static_row(bench, config, run.folder / "static", skip))
    if STATIC in config.variants:
        rows.append(shortgpt_row(bench, config, run.folder / STATIC, skip))
    if "dense LoRA" in config.variants:
        rows.append(study.dense_row(bench, config, run.folder / "dense"))
    run.finish(rows, against_static=frontier.against_static(bench, "DLR"))

# %% [markdown]
# ## Result

# %% tags=["nbval-ignore-output"]
run.table(shown(run.rows))

# %% tags=["nbval-ignore-output"]
title = f"Token-level routing, target skip {config.target_skip:.0%}"
run.figure(comparison(run.rows, title), "comparison")

# %% tags=["nbval-ignore-output"]
run.figure(training(run.logs(folders), "Skip during training"), "training")

# %% tags=["nbval-ignore-output"]
skipping = [row for row in run.rows if kind_of(row) not in ("base", "dense")
            and row.get("unit", config.unit) == config.unit]      # columns are of one kind
run.figure(keep_rates(skipping, config.always_keep), "keep_rates")

# %% [markdown]
# ## What it means
#
# Whether a router is truly token-dependent shows in its distance to its own shuffled plan, and
# whether that is worth anything in its distance to the best static plan. A router that scores worse
# than a random plan on its own weights has learnt a plan that its model was not healed for.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.token_routing(run.rows, config.target_skip, run.metrics["against_static"]))
