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
# # 06 · Latency: is the time really saved?
#
# **Question.** How much faster is a pass that skips 25, 40 or 50 % of the routable layers, against
# the dense model and against the ceiling, a model cut to the same number of layers?
#
# **Method.** Five systems take turns in one run, each turn in an order of its own, so that drift of
# the machine falls on all alike (masked and two-pass, which save nothing, in every second turn).
# Ratios are taken within a turn; medians and quartiles over the turns are shown. The systems:
# *dense*; *truncation* (the first layers only, as many as the plan keeps: the ceiling); *masked*
# (everything computed, then blended); *two-pass* (the original hooks: a pass for the router, then a
# masked one); and *compact*. The plan is that of a trained router, recorded on test documents; on
# another model it is stretched over the layers. Every routed system runs its router as well, and skip
# adapters of the rank that is asked for. Shapes of published models, routers and adapters hold
# random weights: speed does not depend on what the weights are.
#
#     python -m dlr run latency --params params/latency/tinyllama.yaml
#     python -m dlr run latency --params params/latency/smollm2.yaml
#
# A run of these settings that is recorded already is shown; any other goes to `results/scratch/`,
# or to a folder of its own if `run_name` is given one. Times are the machine's: the line below says
# whose.

# %% tags=["parameters"]
run_name: str = ""
shape: str = "nano"
model: str = ""
skip_adapter_rank: int = 0
checkpoint: str = ""
layers: int = 0
dtype: str = "auto"
skips: list = [0.25, 0.4, 0.5]
lengths: list = [512]
batches: list = [1]
context: int = 256
decode_batches: list = [1]
decode_steps: int = 16
repeats: int = 9

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("latency", globals())

# %% tags=["nbval-ignore-output"]
import itertools
from pathlib import Path

import pandas as pd
import torch

from dlr.measure import costs
from dlr.measure import latency
from dlr.measure import shapes
from dlr.measure.captured import CapturedDecode
from dlr.figures.latency import speedups
from dlr.base.models import load_base
from dlr.workbook.runner import open_run

run = open_run("latency", config)
name = Path(config.model).name or config.shape

# %% tags=["nbval-ignore-output"]
if not run.done:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loading = config.loading | {"device": device} if config.checkpoint else {}
    plan, trained = shapes.recorded_logits(config.checkpoint, config.plan_docs, **loading)
    base = config.model or (config.shape if config.shape == "nano" else "")
    precision = None if config.dtype == "auto" else config.dtype
    subject = latency.subject(
        name, plan, config.skips, layers=config.layers or None, device=device,
        dtype=getattr(torch, precision or "", None), skip_adapter_rank=config.skip_adapter_rank,
        model=load_base(base, **config.loading_base, device=device)[0] if base else None,
        attn_implementation=config.attn_implementation,
        trained=trained if config.checkpoint and trained.base["name"] == config.model else None)

# %% tags=["nbval-ignore-output"]
if not run.done:
    works = [latency.Prefill(subject, batch, length)
             for batch in config.batches for length in config.lengths]
    rows = [latency.measure(work, [0.0, *config.skips], repeats=config.repeats) for work in works]
    decodes = [latency.Decode, CapturedDecode] if config.captured else [latency.Decode]
    for decode, batch in itertools.product(decodes, config.decode_batches):
        work = decode(subject, batch, config.context, config.decode_steps)
        rows.append(latency.measure(work, config.skips, repeats=config.repeats))
    short = latency.Prefill(subject, 1, min(config.lengths))
    run.finish(pd.concat(rows).to_dict("records"),
               costs=costs.flops_and_memory(short, config.skips).to_dict("records"),
               overhead=costs.rows_overhead(short),
               products=costs.row_costs(works[0], config.skips).to_dict("records"),
               profile=costs.profile_prefill(works[0], config.skips).to_dict("records"))

# %% tags=["nbval-ignore-output"]
metrics = run.metrics
table = pd.DataFrame(run.rows)
columns = ["batch", "length", "part", "system", "skip", "median", "q1", "q3", "p95",
           "tokens_per_second", "peak_gb", "speedup", "speedup_q1", "speedup_q3", "bound",
           "share_of_bound", "share_of_truncation"]
columns = [name for name in columns if name in table]
first = table.iloc[0]
print(f"{first['layers']} layers, {first['dtype']}, {run.record['hardware']['threads']} threads")

# %% [markdown]
# ## Prefill
#
# One pass with last-token logits; *layers* is the time from the embedding to the last norm.

# %% tags=["nbval-ignore-output"]
table[table["work"] == "prefill"][columns].round(3)

# %% [markdown]
# How near can it come? A product of few rows costs more a row than one of many, whoever asks for
# it. Timed alone, at the rows the plan keeps, the layer's largest product gives the speed-up that
# such products allow (`product_bound`), to set beside the layer-count bound and what compact
# execution reached (`compact`, layers only).

# %% tags=["nbval-ignore-output"]
products = pd.DataFrame(metrics["products"])
same = table.query("work == 'prefill' and batch == @first.batch and length == @first.length")
reached = same.query("system == 'compact' and part == 'layers'").set_index("skip")["speedup"]
products.assign(compact=products["skip"].map(reached)).round(3)

# %% [markdown]
# A layer run by rows is called twice. What that costs beside its products decides which layers are
# left alone: `flops` as measured here, `guard` what compact execution reckons with.

# %% tags=["nbval-ignore-output"]
pd.DataFrame([metrics["overhead"]] if "overhead" in metrics else [])

# %% [markdown]
# And where the time goes, by torch's profiler: milliseconds of matrix products, attention and all
# other operations, each beside what it would be if its time were proportional to the layers run.

# %% tags=["nbval-ignore-output"]
pd.DataFrame(metrics["profile"]).round(1)

# %% [markdown]
# ## Decoding
#
# Seconds a step, one token a sequence; *layers* leaves out the output head, which every system runs
# in full. With `captured=true`, on a CUDA device, the rows of *captured decode* follow: the host
# launches one CUDA graph a layer that runs, and a small one for the key and value of a layer that
# does not. Their dense baseline has the same graphs, and *compiled* is the dense model compiled whole.
#
#     python -m dlr run latency --params params/latency/gpu.yaml

# %% tags=["nbval-ignore-output"]
table[table["work"] != "prefill"][columns].round(3)

# %% tags=["nbval-ignore-output"]
run.figure(speedups(run.rows, f"{name}, {first['dtype']}"), "speedups")

# %% [markdown]
# ## Operations and memory
#
# FLOPs of the same prefill by torch's counter and in closed form, without the output head; most
# memory in use, relative to the dense model; bytes of keys and values, which skipping does not
# change. The counter lies above the closed form, dense model included, because it can count eager
# attention only, which computes the whole square of scores: the closed form counts the half that a
# causal model needs.

# %% tags=["nbval-ignore-output"]
pd.DataFrame(metrics["costs"]).round(3)

# %% [markdown]
# ## What it means
#
# `share_of_bound` compares with time proportional to the layers run; `share_of_truncation` with a
# model that has only so many layers. What compact execution leaves on the table are products of few
# rows, which cost more a row, the keys and values of skipped tokens, and, on small layers, the time
# it takes to call a layer's modules twice, whatever the number of rows.

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from dlr.workbook import findings

Markdown(findings.latency(table))
