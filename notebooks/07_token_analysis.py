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
# # 07 · What the router has learnt
#
# **Question.** Does a trained router's plan depend on the token, on what in the token, and how much
# of what a per-token plan could save does it save?
#
# **Method.** A trained router (the embedded one unless `checkpoint` names another) is run over test
# documents, which nothing was trained on, and every token is recorded. Statistics and figures are
# functions of that record. On smaller samples three instruments run the model again: the plan
# shuffled among tokens, the greedy per-token oracle beside the best static plan (KL from the dense
# model, measured on finished plans), and probes that predict each layer's harm.
#
#     python -m dlr run token_analysis --params params/token_analysis/nano.yaml
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
checkpoint: str = ""
dataset: str = "embedded"
record_docs: int = 96
eval_len: int = 192
oracle_docs: int = 16
probe_docs: int = 48
oracle_len: int = 96
budgets: list = [0.2, 0.4, 0.6]
weights: list = ["checkpoint", "base"]
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("token_analysis", globals())

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr.workbook import findings
from dlr.workbook import token_study
from dlr.figures.analysis import (category_depth, difficulty, headroom, position, predictability,
                                  words)
from dlr.measure.record import Record
from dlr.workbook.runner import open_run

run = open_run("token_analysis", config)

# %% [markdown]
# ## The record
#
# Tokens, gates, logits and losses, saved as safetensors and JSON. Everything up to the oracle is
# read off the saved record, without the model.

# %% tags=["nbval-ignore-output"]
if not run.done:
    token_study.measure(config, run)
metrics = run.metrics
tokens = Record.load(run.folder / "record")
shape = tokens.meta["always_keep"], tokens.meta["units_per_layer"]
print(f"{len(tokens):,} tokens, skip {tokens.skip_ratio:.3f}, "
      f"perplexity {tokens.perplexity('dense'):.2f} dense, {tokens.perplexity():.2f} routed; "
      f"target {metrics['target']:.0%}")

# %% [markdown]
# ## Who gets depth
#
# Categories of the token read at a position. A token may belong to several, so the rows overlap.

# %% tags=["nbval-ignore-output"]
by_category = pd.DataFrame(metrics["categories"])
if not by_category["category"].str.startswith("POS").any():
    print("Parts of speech are left out: spaCy or its model en_core_web_sm was not installed.")
by_category.filter(regex="^(?!keep)").sort_values("active_layers").round(3)

# %% tags=["nbval-ignore-output"]
run.figure(category_depth(metrics["categories"], *shape), "category_depth")

# %% [markdown]
# ## Does the plan depend on the token?
#
# The shuffled plan has the same layers' rates and the same numbers of layers, but the tokens' plans
# are dealt out again among them: what it loses is what token-dependence is worth. Mutual
# information is given beside chance (depths dealt out again within each document); variance shares
# say how the plan varies, not whether that serves the tokens.

# %% tags=["nbval-ignore-output"]
gap = metrics["shuffled"]
plans = metrics["collapse"]
print(f"perplexity {gap['routed']:.2f}, shuffled {gap['shuffled']:.2f}: "
      f"{gap['nll_difference']:+.4f} nats a token ({gap['low']:+.4f} to {gap['high']:+.4f})")
print(f"{plans['plans']} different plans, the commonest for {plans['commonest_plan']:.0%} of the "
      f"tokens; of {tokens.gates.shape[1]} routable units {len(plans['always'])} always run and "
      f"{len(plans['never'])} never do")
pd.DataFrame(metrics["information"]).T.round(4)

# %% tags=["nbval-ignore-output"]
pd.DataFrame([metrics["variance"]], index=["share of the plan's variance"]).round(3)

# %% [markdown]
# ## Difficulty, position, context

# %% tags=["nbval-ignore-output"]
benefit = metrics["benefit"]
in_loss = metrics["benefit_loss"][0]["correlation"]
print(f"correlation of active layers with the summed benefit: "
      f"{benefit[0]['correlation']:+.3f} in KL, {in_loss:+.3f} in loss")
run.figure(difficulty(metrics["difficulty"], benefit, *shape), "difficulty")

# %% tags=["nbval-ignore-output"]
run.figure(position(metrics["position"]), "position")

# %% [markdown]
# The same token in different contexts, and the shares of the variance of depth that lie between
# tokens (what a lookup table would decide) and between documents.

# %% tags=["nbval-ignore-output"]
run.figure(words(tokens, metrics["least"]), "words")
pd.DataFrame([metrics["between"]], index=["share of the variance of depth"]).round(3)

# %% [markdown]
# ## How much of the headroom is captured?
#
# The oracle closes, token by token, the layer that adds least KL, and again, at one price for all
# tokens, until it skips as much as the router does. The static plan is the same search with one
# vector for all tokens, on calibration text. Captured = (static − routed) / (static − oracle). The
# checkpoint's LoRA was trained under the router's plan, which favours the router; the base model's
# own weights favour none.

# %% tags=["nbval-ignore-output"]
for kind, search in metrics["static"].items():
    print(f"{kind} weights: {search['passes']} forward passes; the router agrees with the best "
          f"static plan in {search['agreement']:.1%} of gates")
pd.DataFrame(run.rows).round(3)

# %% tags=["nbval-ignore-output"]
run.figure(headroom(run.rows), "headroom")

# %% [markdown]
# ## How much could any router know?
#
# R² of probes that predict, from a token's state in the base model, the KL that skipping one layer
# adds at full depth (clipped at its 1st and 99th percentile), on documents held out. Depth 0 is the
# token's embedding alone.

# %% tags=["nbval-ignore-output"]
run.figure(predictability(metrics["probes"], *shape), "predictability")

# %% [markdown]
# ## What it means

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

Markdown(findings.token_analysis(metrics, tokens.meta["always_keep"]))
