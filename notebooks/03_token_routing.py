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
# **Question.** Which training makes a token-level router hit its budget, and does it then beat plans that do not look at
# the token?
#
# **Method.** All variants share base, data, steps, LoRA and seed.
#
# | variant | objective |
# |---|---|
# | v1 | cross-entropy, distillation and one global penalty on the mean gate |
# | v2 | the original objective: per-layer L1, summed, and a squared target term |
# | cold | controlled budget (the threshold is the dual variable), router trained end to end |
# | DLR | controlled budget after a warm start on marginal harm, shrunk towards the best static plan: the default |
# | DLR without KD | the default with cross-entropy alone |
#
# Every controlled router is calibrated on held-out text and measured on the test split, beside its own plan shuffled
# across tokens, its mean plan, a random plan at the same skip, and the best static plan healed by the same LoRA budget.

# %% tags=["parameters"]
run_name: str = "default"
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
warm_tokens: int = 6144
seed: int = 0

# %%
import sys

sys.path.insert(0, "..")          # JupyterLab starts kernels in notebooks/; the package is one folder up

from dlr.config import SettingsError
from dlr.workbook import notebook_settings

config = notebook_settings("token_routing", globals())
CHANGES = {"v1": {"objective": "global_penalty", "warm_start": False, "router_lr": 1e-2},
           "v2": {"objective": "original", "warm_start": False, "router_lr": 1e-2},
           "cold": {"warm_start": False}, "DLR": {}, "DLR without KD": {"kd_weight": 0.0}}
unknown = set(config.variants) - CHANGES.keys() - {"best static", "dense LoRA"}
if unknown:
    raise SettingsError(f"variants={sorted(unknown)} are none of {[*CHANGES, 'best static', 'dense LoRA']}")

# %% tags=["nbval-ignore-output"]
import pandas as pd

from dlr import figures, study
from dlr.runs import Run, results_folder, write_atomically

run = Run(results_folder() / "token_routing" / config.run_name)
bench = study.open_bench(config)
run.start(config.model_dump(), bench.data_hash)
rows = [study.base_row(bench)]

# %% tags=["nbval-ignore-output"]
logs = {}
for name, changes in CHANGES.items():
    if name not in config.variants:
        continue
    folder = run.folder / name.replace(" ", "-")
    variant = study.train(bench, name, config.model_copy(update=changes), folder)
    rows += study.routed_rows(bench, variant)
    logs[name] = pd.read_csv(folder / "log.csv")
    variant.close()

# %% tags=["nbval-ignore-output"]
if "best static" in config.variants:
    skip = next((row["skip"] for row in rows if row["variant"] == "DLR"), config.target_skip)
    rows.append(study.static_row(bench, config, run.folder / "static", skip))
if "dense LoRA" in config.variants:
    rows.append(study.dense_row(bench, config, run.folder / "dense"))

# %% [markdown]
# ## Result

# %% tags=["nbval-ignore-output"]
table = pd.DataFrame(rows)
shown = table[["variant", "skip", "active_layers", "perplexity", "perplexity_low", "perplexity_high"]].round(3)
write_atomically(run.folder / "table.md", shown.to_markdown(index=False) + "\n")
shown

# %% tags=["nbval-ignore-output"]
picture = figures.comparison(table, f"Token-level routing, target skip {config.target_skip:.0%}")
figures.save(picture, run.folder, "comparison");

# %% tags=["nbval-ignore-output"]
picture = figures.training(logs, "Skip during training")
figures.save(picture, run.folder, "training");

# %% tags=["nbval-ignore-output"]
picture = figures.keep_rates(table[~table["variant"].isin(["base", "dense LoRA"])], config.always_keep)
figures.save(picture, run.folder, "keep_rates");

# %% tags=["nbval-ignore-output"]
verdict = study.against_static(bench, "DLR")
if verdict:
    side = "below" if verdict["high"] < 0 else "above" if verdict["low"] > 0 else "not distinguishable from"
    print(f"DLR is {side} the best static plan: {verdict['nll_difference']:+.4f} nats a token "
          f"({verdict['low']:+.4f} to {verdict['high']:+.4f}); negative favours DLR.")

# %%
run.finish(rows, against_static=verdict);

# %% [markdown]
# ## What it means
#
# v1 and v2 end wherever their penalties drive them; only the controlled budget lands on its target. Whether a router is
# truly token-dependent shows in its distance to its own shuffled plan, and whether that is worth anything in its
# distance to the best static plan: the line above says which, with its interval.
