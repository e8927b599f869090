"""Sentences say what their intervals say, and nothing that the printed numbers do not."""

import json

import pytest

from dlr.workbook.report import claims, verdicts
from dlr.workbook.report.sources import MADE, Missing, Results, found, shaped
from dlr.workbook.report.verdicts import BETTER, EVEN, MIXED, WORSE

ROWS = {"below": (-0.02, -0.03, -0.01), "above": (0.02, 0.01, 0.03), "across": (-0.01, -0.02, 0.01),
        "nothing": (-1e-10, -2e-10, -1e-11), "touching": (-0.01, -0.02, -0.00004),
        "outside": (0.05, -0.01, 0.01)}


@pytest.fixture
def results(tmp_path):
    """One run with a row for each case."""
    rows = [{"name": name, "nll_difference": value, "low": low, "high": high}
            for name, (value, low, high) in ROWS.items()]
    (tmp_path / "pareto" / "x").mkdir(parents=True)
    (tmp_path / "pareto" / "x" / "metrics.json").write_text(json.dumps({"rows": rows}))
    return Results(tmp_path)


def case(results, name):
    return verdicts.interval(results, "pareto/x", "rows", {"name": name})


@pytest.mark.parametrize("name, lower, higher", [
    ("below", BETTER, WORSE), ("above", WORSE, BETTER), ("across", EVEN, EVEN),
    ("nothing", EVEN, EVEN),            # printed as zero, though all of it lies below
    ("touching", EVEN, EVEN)])          # printed as ending at zero
def test_a_side_is_read_off_what_is_printed(results, name, lower, higher):
    assert verdicts.side(case(results, name)) == lower
    assert verdicts.side(case(results, name), lower_is_better=False) == higher


def test_an_interval_holds_its_difference(results):
    with pytest.raises(ValueError, match="within its own interval"):
        verdicts.side(case(results, "outside"))


def test_seeds_that_disagree_are_no_verdict(results):
    below, across = case(results, "below"), case(results, "across")
    assert verdicts.together([below, below]) == BETTER
    assert verdicts.together([below, across]) == MIXED
    words = verdicts.told(results, "A", "B", {"20 %": [below, below, across]})
    assert list(words) == [MIXED]
    assert words[MIXED].striptags() == ("A against B: at 20 % skip, better than it in 2 and not "
                                        "distinguishable from it in 1 of 3 seeds.")


def test_each_side_has_a_sentence_of_its_own(results):
    below, above, across = (case(results, name) for name in ("below", "above", "across"))
    words = verdicts.told(results, "A", "B", {"20 %": [below, below], "40 %": [below, below],
                                              "60 %": [above, above], "80 %": [across, across]})
    assert {side: text.striptags() for side, text in words.items()} == {
        BETTER: "A is better than B at 20 % and 40 % skip, in each of 2 seeds.",
        WORSE: "A is worse than B at 60 % skip, in each of 2 seeds.",
        EVEN: "A is not distinguishable from B at 80 % skip, in each of 2 seeds."}
    alone = verdicts.told(results, "A", "B", {"20 %": [below]})
    assert alone[BETTER].striptags() == "A is better than B at 20 % skip."
    with pytest.raises(Missing):
        verdicts.told(results, "A", "B", {})


def test_a_series_goes_one_way_only_if_every_step_does(results):
    def series(*names):
        return [results.metric("pareto/x", "rows", {"name": name}, "low") for name in names]
    assert verdicts.risen(series("below", "across", "above")) == "rises each time"
    assert verdicts.risen(series("above", "across", "below")) == "falls each time"
    assert verdicts.risen(series("above", "below", "above")) == "does not go one way"
    assert verdicts.risen(series("nothing", "nothing")) == "does not go one way"


def test_names_are_escaped_in_sentences(results):
    words = verdicts.told(results, "<b>A</b>", "B", {"x": [case(results, "below")]})
    assert "<b>" not in words[BETTER] and "&lt;b&gt;" in words[BETTER]


def test_a_row_is_found_by_what_it_says_or_not_at_all(results):
    content = {"rows": [{"a": 1, "b": 2, "v": 3}, {"a": 1, "b": 4, "v": 5}]}
    assert found(content, ("rows", {"a": 1, "b": 4}, "v")) == 5
    for steps in (("rows", {"a": 1}, "v"), ("rows", {"a": 9}, "v"), ("rows", 7), ("none",)):
        with pytest.raises(LookupError):
            found(content, steps)
    with pytest.raises(Missing) as missing:
        results.metric("pareto/y", "rows")
    assert missing.value.run == "pareto/y"
    assert shaped(-0.5, "+.1f", 100) == "−50.0" and shaped(None, ".2f") == "–"
    assert MADE["SD"]([1.0, 3.0]) == pytest.approx(2**0.5) and MADE["SD"]([1.0]) == 0.0


def frontier_of(tmp_path, *differences):
    """Results with a run a seed, whose router lies so far from the static plan."""
    for seed, (value, low, high) in enumerate(differences):
        folder = tmp_path / "pareto" / f"router-seed={seed}"
        folder.mkdir(parents=True, exist_ok=True)
        row = {"kind": "routed", "target_skip": 0.4, "skip": 0.4, "perplexity": 30.0}
        against = {"target_skip": 0.4, "nll_difference": value, "low": low, "high": high}
        (folder / "metrics.json").write_text(json.dumps({"rows": [row], "against_static": [against]}))
        settings = {"model": "nano", "dataset": "embedded", "steps": 40}
        (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return Results(tmp_path)


@pytest.mark.parametrize("differences, where, words", [
    ([ROWS["below"]] * 3, claims.HOLDS, "better than the best static plan at 40 % skip, in each of 3"),
    ([ROWS["above"]] * 2, claims.FAILS, "worse than the best static plan at 40 % skip, in each of 2"),
    ([ROWS["across"]], claims.OPEN, "not distinguishable from the best static plan at 40 %"),
    ([ROWS["below"], ROWS["above"]], claims.OPEN, "better than it in 1 and worse than it in 1 of 2")])
def test_a_claim_stands_in_the_list_of_its_verdict(tmp_path, differences, where, words):
    lists = claims.judged(frontier_of(tmp_path, *differences))
    assert [name for name, sentences in lists.items() if sentences] == [where]
    assert words in lists[where][0].striptags()
