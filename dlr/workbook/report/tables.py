"""Tables of trained models: the frontier, domains, versions of the router, controls, stages."""

from typing import NamedTuple

from markupsafe import Markup

from dlr.runs import METRICS, Run, alike, kind_of
from dlr.workbook.report.sources import Number, Results
from dlr.workbook.report.verdicts import Interval, interval

BLANK = "–"


class Table(NamedTuple):
    """A table of the report: cells are texts, numbers, intervals or markup of these.

    Attributes:
        name: of its file for LaTeX. runs: '<phase>/<name>' that it is drawn from, whose commands
            stand below it.
    """
    name: str
    caption: str
    columns: list
    rows: list[list]
    runs: list[str]


def percent(number) -> Markup:
    """A number with the sign for per cent."""
    return Markup("{}\u00a0%").format(number)


def spread(results: Results, places: list, shape: str = ".2f", times: float = 1.0):
    """Mean over runs, with the standard deviation where there are several."""
    mean = results.made("mean", places, shape, times)
    if len(places) == 1:
        return mean
    return Markup("{} ± {}").format(mean, results.made("SD", places, shape, times))


def seeds_line(intervals: list[Interval]) -> Markup:
    """The intervals of several seeds, one after the other."""
    return Markup("; <br>").join(intervals)


# -- the frontier ---------------------------------------------------------------------------------
def routed_groups(results: Results, is_embedded: bool) -> dict[tuple, list[str]]:
    """(model, dataset, steps) to the runs of the phase pareto that hold a router, most seeds first.

    Args:
        is_embedded: those of the embedded model, or all others.
    """
    runs = {run: Run(results.root / run) for run in results.runs("pareto")
            if any(row.get("kind") == "routed" for row in results.rows(run))}
    groups = {key: list(group) for key, group in alike(runs).items()
              if (key[0] == "nano") == is_embedded}
    return dict(sorted(groups.items(), key=lambda pair: -len(pair[1])))


def targets_of(results: Results, runs: list[str]) -> list[float]:
    """Budgets that routers of `runs` were asked for, rising."""
    return sorted({row["target_skip"] for run in runs for row in results.rows(run)
                   if row.get("kind") == "routed"})


def places_of(results: Results, runs: list[str], kind: str, target: float, name: str) -> list:
    """Where a value of the row of a kind and budget stands, in each run that has one."""
    steps = ("rows", {"kind": kind, "target_skip": target}, name)
    return [(f"{run}/{METRICS}", steps) for run in runs
            if any(row.get("kind") == kind and row["target_skip"] == target and name in row
                   for row in results.rows(run))]


def against_static(results: Results, runs: list[str], target: float) -> list[Interval]:
    """The router less the best static plan at a budget, a run each."""
    return [interval(results, run, "against_static", {"target_skip": target}) for run in runs
            if any(row["target_skip"] == target
                   for row in results.read(f"{run}/{METRICS}").get("against_static") or ())]


def against_control(results: Results, runs: list[str], kind: str, target: float) -> list[Interval]:
    """A control less its router at a budget, a run each."""
    return [interval(results, file.removesuffix(f"/{METRICS}"), *steps)
            for file, steps in places_of(results, runs, kind, target, "against_router")]


KINDS = {"routed": "DLR", "static": "best static", "mean": "mean plan", "shuffled": "shuffled",
         "random": "random plan"}


def target_of(results: Results, runs: list[str], target: float) -> Number:
    """A budget in whole per cent, as its row records it."""
    place = places_of(results, runs, "routed", target, "target_skip")[:1]
    return results.made("value", place, ".0f", 100)


def frontier(results: Results, runs: list[str], name: str, caption: str) -> Table:
    """Perplexity by budget and kind, mean ± SD over runs, and the paired differences of each."""
    kinds = {kind: words for kind, words in KINDS.items()
             if any(places_of(results, runs, kind, target, "perplexity")
                    for target in targets_of(results, runs))}
    has_static = "static" in kinds
    differences = (["DLR − best static"] if has_static else
                   ["shuffled − DLR", "mean plan − DLR"])
    rows = []
    for target in targets_of(results, runs):
        skips = places_of(results, runs, "routed", target, "skip")
        cells = [places_of(results, runs, kind, target, "perplexity") for kind in kinds]
        own = ([against_static(results, runs, target)] if has_static else
               [against_control(results, runs, kind, target) for kind in ("shuffled", "mean")])
        rows.append([percent(target_of(results, runs, target)),
                     percent(spread(results, skips, ".1f", 100)),
                     *(spread(results, cell) if cell else BLANK for cell in cells),
                     *(seeds_line(each) if each else BLANK for each in own)])
    return Table(name, caption, ["asked", "measured skip", *kinds.values(), *differences], rows,
                 runs)


def domains(results: Results, run: str, name: str, caption: str) -> Table:
    """Difference from the best static plan by domain and budget."""
    rows = results.rows(run, "domains")
    targets = sorted({row["target_skip"] for row in rows})
    columns = [percent(target_of(results, [run], target)) for target in targets]
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        first = {"domain": domain, "target_skip": targets[0]}
        lines.append([results.metric(run, "domains", first, "domain"), *(
            interval(results, run, "domains", {"domain": domain, "target_skip": target},
                     shape="+.3f") for target in targets)])
    return Table(name, caption, ["domain", *columns], lines, [run])


# -- runs of one seed -----------------------------------------------------------------------------
def perplexities(results: Results, run: str, name: str, caption: str) -> Table:
    """Every variant of a run: measured skip, active layers, perplexity with its interval."""
    lines = []
    for place, row in enumerate(results.rows(run)):
        steps = "rows", place
        lines.append([results.metric(run, *steps, "variant"),
                      percent(results.percent(run, *steps, "skip")),
                      results.metric(run, *steps, "active_layers", shape=".1f"),
                      interval(results, run, *steps, shape=".2f",
                               names=("perplexity", "perplexity_low", "perplexity_high"))])
    columns = ["variant", "measured skip", "active layers", "perplexity (95 % interval)"]
    return Table(name, caption, columns, lines, [run])


def _control(results: Results, run: str, variant: str, kind: str):
    """Perplexity of a router's control, and its loss less the router's where that is recorded."""
    for place, row in enumerate(results.rows(run)):
        if kind_of(row) == kind and row.get("of") == variant:
            value = results.metric(run, "rows", place, "perplexity")
            if "against_router" not in row:
                return value
            own = interval(results, run, "rows", place, "against_router", shape="+.3f")
            return Markup("{}; {}").format(value, own)
    return BLANK


def versions(results: Results, run: str, name: str, caption: str) -> Table:
    """Each way to train a router beside the plans that are given its weights and its skip."""
    controls = ("shuffled", "mean", "random")
    lines = []
    for row in results.rows(run):
        if kind_of(row) not in (*controls, "base"):
            steps = "rows", {"variant": row["variant"]}
            lines.append([results.metric(run, *steps, "variant"),
                          percent(results.percent(run, *steps, "skip")),
                          results.metric(run, *steps, "perplexity"),
                          *(_control(results, run, row["variant"], kind) for kind in controls)])
    columns = ["variant", "measured skip", "perplexity",
               *(f"{KINDS[kind]}; less its router" for kind in controls)]
    return Table(name, caption, columns, lines, [run])


def stages(results: Results, run: str, name: str, caption: str) -> Table:
    """Loss of each stage less that of the stage before, by budget."""
    gains = results.rows(run, "gains")
    targets = sorted({row["target_skip"] for row in gains})
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in gains):
        row = {"stage": stage, "target_skip": targets[0]}
        lines.append([results.metric(run, "gains", row, "stage"),
                      results.metric(run, "gains", row, "before"), *(
            interval(results, run, "gains", {"stage": stage, "target_skip": target})
            for target in targets)])
    first = {"stage": gains[0]["stage"]}
    columns = [percent(results.percent(run, "gains", first | {"target_skip": target},
                                       "target_skip", shape=".0f")) for target in targets]
    return Table(name, caption, ["stage", "after", *columns], lines, [run])


def headed(run: str) -> str:
    """A run's name as a part of a file's name."""
    return run.replace("/", "-").replace("=", "-")
