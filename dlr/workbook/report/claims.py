"""What holds and what does not: every sentence is computed, and so is the list that it stands in.

A claim gives sentences by the side on which its differences lie. What is better holds, what is
worse does not, and what seeds or intervals leave open cannot be told.
"""

from collections.abc import Callable, Iterator

from markupsafe import Markup

from dlr.runs import METRICS
from dlr.workbook.report import measures, tables
from dlr.workbook.report.sources import Missing, Number, Results
from dlr.workbook.report.verdicts import (BETTER, EVEN, MIXED, WORSE, Interval, interval, listed,
                                          risen, told)

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
LIST_OF = {BETTER: HOLDS, WORSE: FAILS, EVEN: OPEN, MIXED: OPEN}
STATIC = "the best static plan"
NEAR = 0.01                          # a budget is met within a point of skip

Claims = Iterator[tuple[str, Markup]]


def _sorted(words: dict[str, Markup], before: str = "", after: str = "") -> Claims:
    """Sentences of `told`, each with the list it belongs to."""
    for which, sentence in words.items():
        yield LIST_OF[which], Markup("{}{}{}").format(before, sentence, Markup(after))


def setting_of(results: Results, run: str) -> Markup:
    """'nano on embedded', as the run records model and text."""
    return Markup("{} on {}").format(*(results.setting(run, key) for key in ("model", "dataset")))


# -- trained models -------------------------------------------------------------------------------
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
            yield from _sorted(told(results, "the router", STATIC, cells), here)


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
            yield from _sorted(told(results, "the router", STATIC, cells), here)


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
        yield from _sorted(told(results, *names, cells))


CONTROLS = {"mean": "its mean plan", "random": "a random plan", "shuffled": "its plan shuffled"}


def _missed(results: Results, run: str, variant: str) -> tuple[str, Markup]:
    """Whether a router meets the budget that it was asked for."""
    row = "rows", {"variant": variant}
    places = [(f"{run}/{METRICS}", (*row, key)) for key in ("skip", "target_skip")]
    miss = results.made("gap", places, ".1f", 100)
    words = Markup("{} skips {} % where {} % was asked for, and has perplexity {}.").format(
        variant, results.percent(run, *row, "skip"),
        results.percent(run, *row, "target_skip", shape=".0f"),
        results.metric(run, *row, "perplexity"))
    return (HOLDS if miss.value <= NEAR else FAILS), words


def versions(results: Results, run: str = "token_routing/default") -> Claims:
    """Each version of the router: its budget, and the plans that are given its weights and skip."""
    rows = results.rows(run)
    for variant in [row["variant"] for row in rows if row["kind"] == "routed"]:
        yield _missed(results, run, variant)
        sides: dict[str, list] = {}
        for kind, words in CONTROLS.items():
            for place, row in enumerate(rows):
                if (row["kind"], row.get("of")) == (kind, variant) and "against_router" in row:
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
        yield from _sorted(told(results, "DLR", STATIC, {tables.percent(asked): [own]}),
                           "beside the other versions: ")


def sequence(results: Results, run: str = "sequence_routing/default") -> Claims:
    """Under a price alone the skip is a result, not a setting."""
    priced = [i for i, row in enumerate(results.rows(run)) if row["variant"].startswith("lambda")]
    if len(priced) > 1:
        skips = [results.percent(run, "rows", place, "skip") for place in priced]
        way = risen(skips)
        yield (HOLDS if way == "rises each time" else FAILS), Markup(
            "A sequence router under a price alone: skip {} with the price ({} %).").format(
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


# -- without training -----------------------------------------------------------------------------
def harms(results: Results, run: str = "depth_router/default") -> Claims:
    """Before healing: the plans of each predictor against the best mixture of static ones."""
    for plan in ("depth router", "token alone", "position alone"):
        for which, sentence in _harm(results, run, plan).items():
            # a control that gains nothing fails nobody
            kept = which == BETTER or plan == "depth router"
            yield LIST_OF[which] if kept else OPEN, Markup("before healing, {}").format(sentence)


def _harm(results: Results, run: str, plan: str) -> dict[str, Markup]:
    cells = {tables.percent(measures.budget_number(results, run, budget)):
             [measures.plan_difference(results, run, plan, budget)]
             for budget in measures.budgets_of(results, run)}
    return told(results, f"the {plan}" if plan == "depth router" else plan, "the static plan",
                cells)


def ranks(results: Results) -> Claims:
    """The depth router against the static plan at each rank of the skip adapters."""
    ranked = [run for run in results.runs("depth_router") if "skip_adapter_rank=" in run]
    for run in sorted(ranked, key=lambda run: results.setting(run, "skip_adapter_rank").value):
        rank = results.setting(run, "skip_adapter_rank")
        for which, sentence in _harm(results, run, "depth router").items():
            yield LIST_OF[which], Markup("{}, rank {}, before healing: {}").format(
                setting_of(results, run), rank, sentence)


def labels(results: Results, run: str = "depth_router/default") -> Claims:
    """Whether more labels still help."""
    rows = results.rows(run, "scaling")
    for budget in sorted({row["budget"] for row in rows}):
        counts = sorted({row["labels"] for row in rows if row["budget"] == budget})
        if len(counts) > 1:
            values = [results.metric(run, "scaling", {"labels": count, "budget": budget}, "kl",
                                     shape=".4f") for count in counts]
            way = risen(values)
            yield (HOLDS if way == "falls each time" else FAILS), Markup(
                "With more labelled tokens ({} to {}) the KL at {} % {}, from {} to {}.").format(
                *(results.metric(run, "scaling", {"labels": count, "budget": budget}, "labels",
                                 shape=",") for count in (counts[0], counts[-1])),
                measures.budget_number(results, run, budget), way, values[0], values[-1])


def knowledge(results: Results) -> Claims:
    """Whether the plan depends on the token, and how much of the headroom is captured."""
    for run in results.runs("token_analysis"):
        own = interval(results, run, "shuffled")
        # shuffled less own: the plan is worth something where that is above zero
        for which, sentence in told(results, "the router's own plan", "the same plan shuffled",
                                    {"": [own]}, "over tokens{}", lower_is_better=False).items():
            yield LIST_OF[which], Markup("<code>{}</code>: {} (shuffled less own: {} nats a token)"
                                         ).format(run, sentence, own)
        for place, _ in enumerate(results.rows(run)):
            own = Interval(*(results.percent(run, "rows", place, name, shape=".0f") for name in
                             ("captured", "captured_low", "captured_high")))
            yield (HOLDS if own.low.shown > 0 else FAILS if own.high.shown < 0 else OPEN), Markup(
                "On {} weights at {} % skip the router captures {} % of the oracle's gain over {}."
            ).format(results.metric(run, "rows", place, "weights"),
                     results.percent(run, "rows", place, "skip"), own, STATIC)


def benchmarks(results: Results) -> Claims:
    """The router against the static plan at its own skip, on the same items."""
    for run in results.runs("evaluation"):
        for place, pair in enumerate(results.read(f"{run}/{METRICS}").get("against_static") or ()):
            steps = "against_static", place
            own = interval(results, run, *steps, names=("difference", "low", "high"))
            words = told(results, pair["routed"], pair["static"], {"": [own]}, "in mean accuracy{}",
                         lower_is_better=False)
            tail = Markup(" ({}, over {} tasks)").format(own, results.metric(
                run, *steps, "tasks", shape="d"))
            yield from _sorted(words, Markup("<code>{}</code>: ").format(run), tail)


def _beside(results: Results, run: str, work: str) -> Iterator[tuple[dict, Number, Number]]:
    """(case, speed-up of compact execution, layer-count bound) of a kind of work."""
    for case in measures.speed_cases(results, run):
        if case["work"] == work:
            yield (case, *(measures.timed(results, run, case, "compact", name)
                           for name in ("speedup", "bound")))


def _at(results: Results, run: str, case: dict) -> Markup:
    """'batch 4, 40 % skip'."""
    batch = measures.timed(results, run, case, "compact", "batch")
    skip = measures.timed(results, run, case, "compact", "skip")
    batch.shape, skip.shape, skip.times = "d", ".0f", 100
    return Markup("batch {}, {} % skip").format(batch, skip)


def speeds(results: Results) -> Claims:
    """Whether compact execution saves time, and how far it stays from what the layers would allow.
    """
    for run in results.runs("latency"):
        for work in dict.fromkeys(case["work"] for case in measures.speed_cases(results, run)):
            rows = list(_beside(results, run, work))
            here = Markup("<code>{}</code>, {}: compact execution ").format(run, work)
            faster = [speed.places[0] for _, speed, _ in rows if speed.shown > 1]
            if faster:
                ends = [results.made(how, faster, ".2f") for how in ("least", "most")]
                yield HOLDS, here + Markup(
                    "is faster than dense in {} of {} cases ({} to {} times).").format(
                        results.made("count", faster),
                        results.made("count", [speed.places[0] for _, speed, _ in rows]), *ends)
            for case, speed, _ in rows:
                if speed.shown <= 1:
                    yield FAILS, here + Markup("is no faster than dense at {} ({} times).").format(
                        _at(results, run, case), speed)
            short = [row for row in rows if row[1].shown < row[2].shown]
            if short:
                case, speed, bound = min(short, key=lambda row: row[1].value / row[2].value)
                yield FAILS, here + Markup(
                    "stays below the layer-count bound in {} of {} cases, furthest at {}: "
                    "{} times, where {} would be the bound.").format(
                        results.made("count", [row[1].places[0] for row in short]),
                        results.made("count", [speed.places[0] for _, speed, _ in rows]),
                        _at(results, run, case), speed, bound)


# Section of the report to what it claims.
CLAIMS: dict[str, list[Callable[[Results], Claims]]] = {
    "frontier": [frontiers], "domains": [pretrained, domains, dials], "versions": [versions],
    "sequence": [sequence], "stages": [stages], "harm": [harms, labels, ranks],
    "tokens": [knowledge], "benchmarks": [benchmarks], "latency": [speeds]}


def claimed(results: Results, section: str) -> list[tuple[str, Markup]]:
    """(list it stands in, sentence) of all that a section claims.

    A claim whose run is not there says nothing; the section's tables say what is missing.
    """
    sentences = []
    for claim in CLAIMS.get(section, []):
        try:
            sentences += list(claim(results))
        except Missing:
            continue
    return sentences


def judged(results: Results) -> dict[str, list[Markup]]:
    """The three lists, over all sections."""
    lists: dict[str, list[Markup]] = {HOLDS: [], FAILS: [], OPEN: []}
    for section in CLAIMS:
        for where, sentence in claimed(results, section):
            lists[where].append(sentence)
    return lists
