"""What is claimed of harm before healing, of what the router knows, of benchmarks and of speed."""

from collections.abc import Iterator

from markupsafe import Markup

from dlr.runs import METRICS
from dlr.workbook.report import measures, tables
from dlr.workbook.report.sources import Number, Results
from dlr.workbook.report.verdicts import (CONTROL, FAILS, HOLDS, LIST_OF, OPEN, STATIC, Claims,
                                          Interval, interval, listed, risen, setting_of,
                                          sorted_claims, told)


def harms(results: Results, run: str = "depth_router/default") -> Claims:
    """Before healing: the plans of each predictor against the best mixture of static ones."""
    for plan in ("depth router", "token alone", "position alone"):
        for which, sentence in _harm(results, run, plan).items():
            where = LIST_OF[which] if plan == "depth router" else CONTROL
            yield where, Markup("before healing, {}").format(sentence)


def _harm(results: Results, run: str, plan: str) -> dict[str, Markup]:
    cells = {tables.percent(measures.budget_number(results, run, budget)):
             [measures.plan_difference(results, run, plan, budget)]
             for budget in measures.budgets_of(results, run)}
    return told(results, f"the {plan}" if plan == "depth router" else plan, "the static plan",
                cells)


def ranks(results: Results) -> Claims:
    """The depth router against the static plan, by rank of the skip adapters; alike ones together.
    """
    ranked = [run for run in results.runs("depth_router") if "skip_adapter_rank=" in run]
    alike: dict[tuple, list] = {}
    for run in sorted(ranked, key=lambda run: results.setting(run, "skip_adapter_rank").value):
        for which, sentence in _harm(results, run, "depth router").items():
            alike.setdefault((which, sentence.striptags()), []).append((run, sentence))
    for (which, _), same in alike.items():
        numbers = [results.setting(run, "skip_adapter_rank") for run, _ in same]
        yield LIST_OF[which], Markup("{}, before healing, with adapters of rank {}: {}").format(
            setting_of(results, same[0][0]), listed(numbers), same[0][1])


def labels(results: Results, run: str = "depth_router/default") -> Claims:
    """Whether more labels still help."""
    rows = results.rows(run, "scaling")
    ways: dict[str, list] = {}
    for budget in sorted({row["budget"] for row in rows}):
        counts = sorted({row["labels"] for row in rows if row["budget"] == budget})
        if len(counts) > 1:
            ends = [("scaling", {"labels": count, "budget": budget}) for count in counts]
            values = [results.metric(run, *end, "kl", shape=".4f") for end in ends]
            said = Markup("{}\u00a0% (from {} to {})").format(
                measures.budget_number(results, run, budget), values[0], values[-1])
            ways.setdefault(risen(values), []).append((said, ends))
    for way, found in ways.items():
        ends = found[0][1]
        yield (HOLDS if way == "falls each time" else FAILS), Markup(
            "With more labelled tokens, {} to {}, the KL of the chosen plans {} at {}.").format(
                *(results.metric(run, *end, "labels", shape=",") for end in (ends[0], ends[-1])),
                way, listed([said for said, _ in found]))


def knowledge(results: Results) -> Claims:
    """Whether the plan depends on the token, and how much of the headroom is captured."""
    for run in results.runs("token_analysis"):
        own = interval(results, run, "shuffled")
        # shuffled less own: the plan is worth something where that is above zero
        yield from sorted_claims(
            told(results, "the router's own plan", "the same plan shuffled over tokens",
                 {own: [own]}, "(shuffled less own: {} nats a token)", lower_is_better=False),
            Markup("<code>{}</code>: ").format(run))
        for place, _ in enumerate(results.rows(run)):
            own = Interval(*(results.percent(run, "rows", place, name, shape=".0f") for name in
                             ("captured", "captured_low", "captured_high")))
            yield (HOLDS if own.low.shown > 0 else FAILS if own.high.shown < 0 else OPEN), Markup(
                "On {} weights at {}\u00a0% skip the router captures {}\u00a0% of the oracle's "
                "gain over {}.").format(results.metric(run, "rows", place, "weights"),
                     results.percent(run, "rows", place, "skip"), own, STATIC)


def benchmarks(results: Results) -> Claims:
    """The router against the static plan at its own skip, on the same items."""
    for run in results.runs("evaluation"):
        for place, _ in enumerate(results.read(f"{run}/{METRICS}").get("against_static") or ()):
            steps = "against_static", place
            own = interval(results, run, *steps, names=("difference", "low", "high"))
            names = (results.metric(run, *steps, name) for name in ("routed", "static"))
            by = Markup("{}, over {} tasks").format(own, results.metric(run, *steps, "tasks",
                                                                        shape="d"))
            yield from sorted_claims(told(results, *names, {by: [own]}, "in mean accuracy ({})",
                                          lower_is_better=False),
                                     Markup("<code>{}</code>: ").format(run))


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
    return Markup("batch {}, {}\u00a0% skip").format(batch, skip)


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
