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
# **Question.** Does a trained router's plan depend on the token, on what in the token, and how much of what a per-token
# plan could save does it save?
#
# **Method.** A trained router (the embedded one unless `checkpoint` names another) is run over test documents, which
# nothing was trained on, and every token is recorded. Statistics and figures are functions of that record. On smaller
# samples three instruments run the model again: the plan shuffled among tokens, the greedy per-token oracle beside the
# best static plan (KL from the dense model, measured on finished plans), and probes that predict each layer's harm.
#
#     python -m dlr run token_analysis --params params/token_analysis/nano.yaml

# %% tags=["parameters"]
run_name: str = "default"
checkpoint: str = ""
dataset: str = "embedded"
record_docs: int = 96
eval_len: int = 192
oracle_docs: int = 16
probe_docs: int = 48
oracle_len: int = 96
budgets: list = [0.2, 0.4, 0.6]
weights: list = ["checkpoint"]
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.workbook import notebook_settings

config = notebook_settings("token_analysis", globals())

# %% tags=["nbval-ignore-output"]
import numpy as np
import pandas as pd

from dlr import analysis, categories, figures_analysis, token_study
from dlr.record import Record, record
from dlr.runs import Run, results_folder, save_tensors

run = Run(results_folder() / "token_analysis" / config.run_name)
study = token_study.open_study(config)
run.start(config.model_dump(), f"{study.test.hash}-{study.calibration.hash}")
print(f"target {study.routing.config.calibrated_skip:.0%}, {study.routing.units} routable units, "
      f"{len(study.test)} test documents")

# %% [markdown]
# ## The record
#
# Tokens, gates, logits and losses, saved as safetensors and JSON. Everything up to the oracle is read off the saved
# record, without the model.

# %% tags=["nbval-ignore-output"]
record(study.model, study.routing, study.tokenizer, study.test.texts[:config.record_docs], max_len=config.eval_len,
       top=1).save(run.folder / "record")
save_tensors({"count": token_study.token_frequencies(study)}, run.folder / "frequencies.safetensors")
tokens = Record.load(run.folder / "record")
print(f"{len(tokens):,} tokens, skip {tokens.skip_ratio:.3f}, perplexity {tokens.perplexity('dense'):.2f} dense, "
      f"{tokens.perplexity():.2f} routed")

# %% [markdown]
# ## Who gets depth
#
# Categories of the token read at a position. A token may belong to several, so the rows overlap.

# %% tags=["nbval-ignore-output"]
frequency = token_study.load_counts(run.folder / "frequencies.safetensors")
kinds = categories.categories(tokens, frequency)
pipeline = categories.load_spacy()
if pipeline is None:
    print("Parts of speech are left out: spaCy or its model en_core_web_sm is not installed.")
else:
    speech = categories.part_of_speech(tokens, pipeline)
    kinds = kinds.assign(**{f"POS {tag}": speech == tag for tag in np.unique(speech) if tag})
by_category = analysis.by_category(tokens, kinds)
by_category.filter(regex="^(?!keep)").sort_values("active_layers").round(3)

# %% tags=["nbval-ignore-output"]
figures_analysis.category_depth(by_category);

# %% [markdown]
# ## Does the plan depend on the token?
#
# The shuffled plan has the same layers' rates and the same numbers of layers, but the tokens' plans are dealt out again
# among them: what it loses is what token-dependence is worth. Mutual information is given beside chance (depths dealt
# out again within each document); variance shares say how the plan varies, not whether that serves the tokens.

# %% tags=["nbval-ignore-output"]
gap = token_study.shuffled_gap(study)
mine, depth = analysis.free(tokens), tokens.active_layers.double().numpy()
label, document = categories.partition(kinds), tokens.document.numpy()
information = {"category": analysis.mutual_information(label[mine], depth[mine], document[mine])}
for name in kinds:
    information[name] = analysis.mutual_information(kinds[name].to_numpy()[mine], depth[mine], document[mine])
shares = analysis.variance_shares(tokens.gates.numpy()[mine])
collapse = analysis.collapse(tokens)
repeated, between = analysis.same_word(tokens)
print(f"perplexity {gap['routed']:.2f}, shuffled {gap['shuffled']:.2f}: {gap['nll_difference']:+.4f} nats a token "
      f"({gap['low']:+.4f} to {gap['high']:+.4f})")
print("shares of the plan's variance:", {k: round(v, 3) for k, v in shares.items()})
print("collapse:", collapse)
pd.DataFrame(information).T.round(4)

# %% [markdown]
# ## Difficulty, position, context

# %% tags=["nbval-ignore-output"]
hard = analysis.difficulty(tokens)
found = token_study.benefits(study)
benefit = analysis.benefit_correlations(found["gates"].numpy(), found["kl"].numpy(), found["document"].numpy())
benefit_loss = analysis.benefit_correlations(found["gates"].numpy(), found["loss"].numpy(), found["document"].numpy())
print(f"active layers with the summed benefit: {benefit['correlation'].iloc[0]:+.3f} in KL, "
      f"{benefit_loss['correlation'].iloc[0]:+.3f} in loss")
figures_analysis.difficulty(hard.to_dict("records"), benefit.to_dict("records"));

# %% tags=["nbval-ignore-output"]
position = analysis.by_position(tokens)
figures_analysis.position(position.to_dict("records"));

# %% [markdown]
# The same token in different contexts. Between-token share of the variance of depth: what a lookup table would decide.

# %% tags=["nbval-ignore-output"]
least = 10 if config.record_docs > 20 else 2
print({k: round(v, 3) for k, v in between.items()})
figures_analysis.words(tokens, least);

# %% [markdown]
# ## How much of the headroom is captured?
#
# The oracle closes, token by token, the layer that adds least KL, and again, at one price for all tokens, until it
# skips as much as the router does. The static plan is the same search with one vector for all tokens, on calibration
# text. Captured = (static − routed) / (static − oracle). The checkpoint's LoRA was trained under the router's plan,
# which favours the router; the base model's own weights favour none.

# %% tags=["nbval-ignore-output"]
rows, made = [], {}
for kind in config.weights:
    more, made[kind] = token_study.headroom(study, kind)
    rows += more
    made[kind]["agreement"] = analysis.agreement_with_static(tokens, made[kind]["order"])
    print(f"{kind} weights: {made[kind]['passes']} forward passes; the router agrees with the best static plan in "
          f"{made[kind]['agreement']:.1%} of gates")
pd.DataFrame(rows).round(3)

# %% tags=["nbval-ignore-output"]
figures_analysis.headroom(rows);

# %% [markdown]
# ## How much could any router know?
#
# R² of probes that predict, from a token's state in the base model, the KL that skipping one layer adds at full depth
# (clipped at its 1st and 99th percentile), on documents held out. Depth 0 is the token's embedding alone.

# %% tags=["nbval-ignore-output"]
probes = token_study.probe_rows(study, found)
figures_analysis.predictability(probes, study.routing.first);

# %% tags=["nbval-ignore-output"]
kept = {name: value for name, value in found.items() if not name.startswith("state")}
plans = {name: value for part in made.values() for name, value in part.pop("tensors").items()}
save_tensors(kept | plans, run.folder / "oracle.safetensors")
metrics = run.finish(
    rows, target=study.routing.config.calibrated_skip, skip=tokens.skip_ratio,
    categories=by_category.to_dict("records"), shuffled=gap, information=information, variance=shares,
    collapse=collapse, between=between, least=least, difficulty=hard.to_dict("records"),
    benefit=benefit.to_dict("records"), benefit_loss=benefit_loss.to_dict("records"), position=position.to_dict("records"),
    static=made, probes=probes)
figures_analysis.draw(run.folder);

# %% [markdown]
# ## What it means

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

Markdown(token_study.verdict(metrics, study.routing.first))
