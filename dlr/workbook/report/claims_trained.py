"""What trained models claim: frontier, domains, stages, versions of the router, prices, dials."""

from markupsafe import Markup

from dlr.runs import METRICS, kind_of
from dlr.workbook.report import tables
from dlr.workbook.report.sources import Results
from dlr.workbook.report.verdicts import (FAILS, HOLDS, LIST_OF, STATIC, Claims, interval, listed,
                                          risen, setting_of, sorted_claims, told)

NEAR = 0.01                          # a budget is met within a point of skip


def frontiers(results: Results, is_embedded: bool = True) -> Claims:
    """The router against the healed static plan, at every budget and seed."""
    for runs in tables.routed_groups(results, is_embedded).values():
        cells = {}
        for target in tables.targets_of(results, runs):
            own = tables.against_static(results, runs, target)
            if own:
                cells[tables.percent(tables.target_of(results, runs, target))] = own
        if cells:
            here = Markup("{}, {} steps: ").format(
                setting_of(results, runs[0]), results.setting(runs[0], "steps"))
            yield from sorted_claims(told(results, "the router", STATIC, cells), here)


def pretrained(results: Results) -> Claims:
    """The same of every other model."""
    yield from frontiers(results, is_embedded=False)


def domains(results: Results) -> Claims:
    """The same in each domain, at one price for all of them."""
    for run in results.runs("pareto"):
        rows = results.read(f"{run}/{METRICS}").get("domains") or []
        for domain in dict.fromkeys(row["domain"] for row in rows):
            cells = {}
            for target in sorted({row["target_skip"] for row in rows}):
                asked = tables.percent(tables.target_of(results, [run], target))
                cells[asked] = [interval(results, run, "domains",
                                         {"domain": domain, "target_skip": target}, shape="+.3f")]
            name = results.metric(run, "domains", {"domain": domain,
                                                   "target_skip": rows[0]["target_skip"]},
                                  "domain")
            here = Markup("{}, {}: ").format(setting_of(results, run), name)
            yield from sorted_claims(told(results, "the router", STATIC, cells), here)


def stages(results: Results, run: str = "stages/default") -> Claims:
    """Each stage of the method against the one before."""
    rows = results.rows(run, "gains")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        cells = {}
        for row in own:
            steps = "gains", {"stage": stage, "target_skip": row["target_skip"]}
            asked = results.percent(run, *steps, "target_skip", shape=".0f")
            cells[tables.percent(asked)] = [interval(results, run, *steps)]
        names = f"the stage “{stage}”", f"“{own[0]['before']}”"
        yield from sorted_claims(told(results, *names, cells))


CONTROLS = {"mean": "its mean plan", "random": "a random plan", "shuffled": "its plan shuffled"}


def _missed(results: Results, run: str, variant: str) -> tuple[str, Markup]:
    """Whether a router meets the budget that it was asked for."""
    row = "rows", {"variant": variant}
    places = [(f"{run}/{METRICS}", (*row, key)) for key in ("skip", "target_skip")]
    miss = results.made("gap", places, ".1f", 100)
    words = Markup("{} skips {}\u00a0% where {}\u00a0% was asked for, and has perplexity {}."
                   ).format(
        variant, results.percent(run, *row, "skip"),
        results.percent(run, *row, "target_skip", shape=".0f"),
        results.metric(run, *row, "perplexity"))
    return (HOLDS if miss.value <= NEAR else FAILS), words


def versions(results: Results, run: str = "token_routing/default") -> Claims:
    """Each version of the router: its budget, and the plans that are given its weights and skip."""
    rows = results.rows(run)
    for variant in [row["variant"] for row in rows if kind_of(row) == "routed"]:
        yield _missed(results, run, variant)
        sides: dict[str, list] = {}
        for kind, words in CONTROLS.items():
            for place, row in enumerate(rows):
                if (kind_of(row), row.get("of")) == (kind, variant) and "against_router" in row:
                    own = interval(results, run, "rows", place, "against_router")
                    for which in told(results, variant, words, {words: [own]}, "{}",
                                      lower_is_better=False):
                        sides.setdefault(which, []).append(words)
        for which, controls in sides.items():
            yield LIST_OF[which], Markup("{} is {} {}, on its own weights.").format(
                variant, which, listed(controls))
    if isinstance(results.read(f"{run}/{METRICS}").get("against_static"), dict):
        own = interval(results, run, "against_static")
        asked = results.percent(run, "rows", {"variant": "DLR"}, "target_skip", shape=".0f")
        yield from sorted_claims(told(results, "DLR", STATIC, {tables.percent(asked): [own]}),
                           "beside its other versions: ")


def sequence(results: Results, run: str = "sequence_routing/default") -> Claims:
    """Under a price alone the skip is a result, not a setting."""
    priced = [i for i, row in enumerate(results.rows(run)) if row["variant"].startswith("lambda")]
    if len(priced) > 1:
        skips = [results.percent(run, "rows", place, "skip") for place in priced]
        way = risen(skips)
        yield (HOLDS if way == "rises each time" else FAILS), Markup(
            "A sequence router under a price alone: skip {} with the price ({}\u00a0%).").format(
                way, listed(skips))


def dials(results: Results) -> Claims:
    """How far the skip of the test split lies from what the dial was asked for."""
    for run in results.runs("pareto"):
        rows = results.read(f"{run}/{METRICS}").get("dial") or []
        places = [(f"{run}/{METRICS}", ("dial", i, key)) for i in range(len(rows))
                  for key in ("asked", "skip")]
        if places:
            miss = results.made("widest gap", places, ".1f", 100)
            words = "keeps within a point" if miss.value <= NEAR else "misses by more than a point"
            yield (HOLDS if miss.value <= NEAR else FAILS), Markup(
                "<code>{}</code>: the dial {} of the skip it is asked for (at most {} points off, "
                "over {} settings).").format(run, words, miss, results.made("count", places[::2]))
