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
# # 12 · The report: one document of everything recorded
#
# **Question.** What does all of `results/` say, put together, and what does it not?
#
# **Method.** The report is written from the files of the results folder alone. Every number in it
# names the file and the place that it was read from. Every sentence that states a result is computed
# from a difference and its interval, as they are printed: it says *better than* or *worse than*
# where the interval leaves out zero, and *not distinguishable from* where it does not. So no sentence
# can contradict its table, and the lists of what holds and what does not sort themselves. A run that
# is not there is named with the command that makes it. The same from the command line:
#
#     python -m dlr report
#     python -m dlr report --results DIR --out DIR
#
# It writes `report.html` (one file, no network: open it by a double click), `report.pdf` where a
# browser is at hand, and `tables/*.tex`.

# %% tags=["parameters"]
run_name: str = ""
results_dir: str = ""
out_dir: str = ""
pdf: bool = True

# %%
import sys

sys.path.insert(0, "..")          # kernels start in notebooks/; the package is one folder up

from dlr.workbook.runner import notebook_settings

config = notebook_settings("report", globals())

# %% tags=["nbval-ignore-output"]
from pathlib import Path

from IPython.display import Markdown

from dlr.runs import shown_path
from dlr.workbook.report import claims, page, pictures
from dlr.workbook.report.sources import Results

folder = Path(config.results_dir) if config.results_dir else page.recorded_results()
target = Path(config.out_dir) if config.out_dir else None
written = page.write_report(folder, target, config.pdf, say=lambda text: None)
for path in sorted(written.parent.glob("report.*")):
    print(shown_path(path))

# %% [markdown]
# ## Result
#
# The main figure of the report:

# %% tags=["nbval-ignore-output"]
results = Results(folder)
shown = pictures.pictures(results, "pareto")
picture = shown[0].draw() if shown else None

# %% [markdown]
# ## What it means
#
# The three lists of the report, as its page has them:

# %% tags=["nbval-ignore-output"]
lines = []
for name, sentences in claims.judged(results).items():
    lines += [f"**{name.capitalize()}**\n", *(f"- {each.striptags()}" for each in sentences), ""]
Markdown("\n".join(lines))
