"""What differences and their intervals say, in words that cannot say otherwise.

A verdict is read off the numbers as they are printed: where the table shows an interval that ends
at zero, the sentence says that nothing can be told.
"""

from collections.abc import Iterator
from typing import NamedTuple

from markupsafe import Markup, escape

from dlr.workbook.report.sources import Missing, Number, Results

BETTER, WORSE, EVEN = "better than", "worse than", "not distinguishable from"
MIXED = "mixed"                                   # seeds disagree
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
CONTROL = "control"                               # of a control: said, but in no list
LIST_OF = {BETTER: HOLDS, WORSE: FAILS, EVEN: OPEN, MIXED: OPEN}
STATIC = "the best static plan"
Claims = Iterator[tuple[str, Markup]]             # (list that it stands in, sentence)
SPREAD = Markup("{} ({}, {})")


class Interval(NamedTuple):
    """A difference and the ends of its interval, or a value and the ends of its own."""
    value: Number
    low: Number
    high: Number

    def __html__(self) -> str:
        return SPREAD.format(*self)

    def __str__(self) -> str:
        return f"{self.value} ({self.low}, {self.high})"


def interval(results: Results, run: str, *steps, names=("nll_difference", "low", "high"),
             shape: str = "+.4f", times: float = 1.0) -> Interval:
    """Three values of one row of a run's metrics.json."""
    return Interval(*(results.metric(run, *steps, name, shape=shape, times=times)
                      for name in names))


def side(found: Interval, lower_is_better: bool = True) -> str:
    """On which side of zero a difference lies, with all of its interval.

    Raises:
        ValueError: the interval does not hold the difference.
    """
    low, value, high = found.low.shown, found.value.shown, found.high.shown
    if not low <= value <= high:
        raise ValueError(f"{found.value} does not lie within its own interval, {low} to {high}.")
    if low <= 0 <= high:
        return EVEN
    return BETTER if (high < 0) == lower_is_better else WORSE


def together(seeds: list[Interval], lower_is_better: bool = True) -> str:
    """The side on which the differences of all seeds lie; MIXED where they do not agree."""
    sides = {side(each, lower_is_better) for each in seeds}
    return sides.pop() if len(sides) == 1 else MIXED


def listed(items: list) -> Markup:
    """'a, b and c', each escaped unless it is markup or a number."""
    parts = list(map(escape, items))
    *first, last = parts
    return Markup(" and ").join([Markup(", ").join(first), last]) if first else last


def by_side(cells: dict, lower_is_better: bool = True) -> dict[str, list]:
    """Side to the places (keys of `cells`) whose seeds agree on it."""
    sides: dict[str, list] = {}
    for place, seeds in cells.items():
        sides.setdefault(together(seeds, lower_is_better), []).append(place)
    return sides


def seeds_of(results: Results, cells: dict) -> Markup:
    """', in each of 3 seeds', where every place has as many; nothing where it is one run."""
    counts = {len(seeds) for seeds in cells.values()}
    if counts == {1}:
        return Markup("")
    first = max(cells.values(), key=len)
    number = results.made("count", [each.value.places[0] for each in first])
    words = ", in each of {} seeds" if len(counts) == 1 else ", in each of up to {} seeds"
    return Markup(words).format(number)


def _counted(results: Results, seeds: list[Interval], lower_is_better: bool) -> Markup:
    """How many seeds lie on each side: 'better in 2, not distinguishable in 1'."""
    parts = []
    for which in (BETTER, WORSE, EVEN):
        own = [each for each in seeds if side(each, lower_is_better) == which]
        if own:
            number = results.made("count", [each.value.places[0] for each in own])
            parts.append(Markup("{} it in {}").format(which, number))
    return listed(parts)


def told(results: Results, subject, other, cells: dict, where: str = "at {} skip",
         lower_is_better: bool = True) -> dict[str, Markup]:
    """A sentence a side on which differences lie: side to sentence.

    Args:
        subject, other: names, texts or as the results have them.
        cells: place (a number or a name) to the intervals of its seeds, subject minus other.
        where: how the list of places is said.
    """
    if not cells or not all(cells.values()):
        raise Missing("results", f"difference between {subject!s} and {other!s}")
    words = {}
    for which, places in by_side(cells, lower_is_better).items():
        here = Markup(where).format(listed(places))
        own = {place: cells[place] for place in places}
        if which == MIXED:
            parts = [Markup("{}, {} of {} seeds").format(
                Markup(where).format(place), _counted(results, seeds, lower_is_better),
                results.made("count", [each.value.places[0] for each in seeds]))
                for place, seeds in own.items()]
            words[which] = Markup("{} against {}: {}.").format(subject, other, listed(parts))
        else:
            words[which] = Markup("{} is {} {} {}{}.").format(
                subject, which, other, here, seeds_of(results, own))
    return words


def risen(values: list[Number]) -> str:
    """How a series goes: 'rises each time', 'falls each time', or 'does not go one way'."""
    shown = [value.shown for value in values]
    steps = [after - before for before, after in zip(shown, shown[1:])]
    if steps and all(step > 0 for step in steps):
        return "rises each time"
    return "falls each time" if steps and all(step < 0 for step in steps) else "does not go one way"


def sorted_claims(words: dict[str, Markup], before: str = "", after: str = "") -> Claims:
    """Sentences of `told`, each with the list it belongs to."""
    for which, sentence in words.items():
        yield LIST_OF[which], Markup("{}{}{}").format(before, sentence, Markup(after))


def setting_of(results: Results, run: str) -> Markup:
    """'nano on embedded', as the run records model and text."""
    return Markup("{} on {}").format(*(results.setting(run, key) for key in ("model", "dataset")))
