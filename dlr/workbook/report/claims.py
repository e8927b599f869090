"""What holds and what does not: every sentence is computed, and so is the list that it stands in.

A claim gives sentences by the side on which its differences lie. What is better holds, what is
worse does not, and what seeds or intervals leave open cannot be told.
"""

from collections.abc import Callable
from functools import lru_cache

from markupsafe import Markup

from dlr.runs import METRICS
from dlr.workbook.report import claims_measured as measured
from dlr.workbook.report import claims_trained as trained
from dlr.workbook.report import predecessor
from dlr.workbook.report.sources import Missing, Results
from dlr.workbook.report.tables import routed_groups
from dlr.workbook.report.verdicts import FAILS, HOLDS, OPEN, Claims, listed, setting_of


def beside(results: Results) -> Claims:
    """Our ratios on the predecessor's protocol against its own."""
    for is_smaller, sentence in predecessor.beside(results):
        yield (HOLDS if is_smaller else FAILS), sentence


# Section of the report to what it claims.
CLAIMS: dict[str, list[Callable[[Results], Claims]]] = {
    "frontier": [trained.frontiers],
    "domains": [trained.pretrained, trained.domains, trained.dials],
    "versions": [trained.versions], "sequence": [trained.sequence], "stages": [trained.stages],
    "harm": [measured.harms, measured.labels, measured.ranks], "tokens": [measured.knowledge],
    "benchmarks": [measured.benchmarks], "latency": [measured.speeds], "predecessor": [beside]}


def claimed(results: Results, section: str) -> list[tuple[str, Markup]]:
    """(list it stands in, sentence) of all that a section claims.

    A claim whose run is not there says nothing; the section's tables say what is missing.
    """
    return [pair for claim in CLAIMS.get(section, []) for pair in _those_of(results, claim)]


@lru_cache(maxsize=256)
def _those_of(results: Results, claim: Callable[[Results], Claims]) -> list[tuple[str, Markup]]:
    try:
        return list(claim(results))
    except Missing:
        return []


def judged(results: Results) -> dict[str, list[Markup]]:
    """The three lists, over all sections."""
    lists: dict[str, list[Markup]] = {HOLDS: [], FAILS: [], OPEN: []}
    for section in CLAIMS:
        for where, sentence in claimed(results, section):
            if where in lists:                       # all but controls
                lists[where].append(sentence)
    return lists


def headlines(results: Results) -> list[tuple[str, Markup]]:
    """What a reader in a hurry has to know: the frontiers, where they are lost, and benchmarks."""
    found = [*claimed(results, "frontier"), *_those_of(results, trained.pretrained)]
    lost = [pair for pair in _those_of(results, trained.domains) if pair[0] == FAILS]
    return found + lost + claimed(results, "benchmarks")


def seeded(results: Results) -> Markup:
    """Which comparisons rest on several seeds."""
    groups = [runs for is_embedded in (True, False)
              for runs in routed_groups(results, is_embedded).values()]
    several = [Markup("{} ({} seeds)").format(setting_of(results, runs[0]), results.made(
        "count", [(f"{run}/{METRICS}", ("rows", 0, "seed")) for run in runs]))
        for runs in groups if len(runs) > 1]
    if not several:
        return Markup("Every table is of one seed.")
    return Markup("Of the frontiers, those of several seeds are: {}. Where a table names no seeds, "
                  "it is one run.").format(listed(several))
