"""Tables by domain: they add up to the whole, and are refused where the domains are of other documents."""

import numpy as np
import pandas as pd
import pytest
import torch

from dlr.base.data import Documents, padded_batches
from dlr.figures.domains import domains_against_static
from dlr.figures.register import registered
from dlr.measure.domains import domain_differences, domain_rows
from dlr.measure.evaluate import evaluate, mean_nll, paired_difference, summary
from dlr.routing.attach import attach
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan
from dlr.runs import Run

DOMAINS = ["prose", "code", "sums"] * 4


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr("dlr.measure.evaluate.BOOTSTRAP", 50)


@pytest.fixture
def tables(model, tokenizer):
    """Full depth, and half of the units dropped, on twelve documents of three domains."""
    texts = [f"{name} number {place} " * (3 + place) for place, name in enumerate(DOMAINS)]
    batches = padded_batches(Documents("x", "test", texts, "", DOMAINS), tokenizer, 40, 5)
    routing = attach(model, RouterConfig(always_keep=2, keep_first_tokens=0))
    half = StaticPlan(torch.tensor([1.0, 0, 0, 1]))
    return [evaluate(model, routing, batches, policy, kl=True, bar=False) for policy in (None, half)]


def test_rows_by_domain_are_those_of_its_documents_and_add_up_to_the_whole(tables):
    dense, half = tables
    rows = {row["domain"]: row for row in domain_rows(half, DOMAINS, 2)}
    assert list(rows) == sorted(set(DOMAINS))
    for name, row in rows.items():
        alone = half[[DOMAINS[doc] == name for doc in half["doc"]]]
        assert row == {"domain": name, **summary(alone, 2)} and row["documents"] == 4
        assert row["skip"] == pytest.approx(0.5) and row["kl"] > 0 and row["perplexity_low"] < row["perplexity_high"]
    tokens = [row["predicted_tokens"] for row in rows.values()]
    assert np.average([np.log(row["perplexity"]) for row in rows.values()], weights=tokens) == pytest.approx(mean_nll(half))
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-6) for row in domain_rows(dense, DOMAINS, 2))


def test_differences_by_domain_are_paired_and_add_up(tables):
    dense, half = tables
    rows = domain_differences(half, dense, DOMAINS)
    tokens = [row["predicted_tokens"] for row in domain_rows(half, DOMAINS, 2)]
    assert np.average([row["nll_difference"] for row in rows], weights=tokens) == pytest.approx(
        paired_difference(half, dense)["nll_difference"])
    for row, turned in zip(rows, domain_differences(dense, half, DOMAINS)):
        assert row["low"] <= row["nll_difference"] <= row["high"] and row["documents"] == 4
        assert row["nll_difference"] == pytest.approx(-turned["nll_difference"])
    same = domain_differences(half, half, DOMAINS)
    assert all(row["nll_difference"] == row["low"] == row["high"] == 0 for row in same)
    shuffled = half.sample(frac=1, random_state=0).sort_values("doc")          # another index, the same documents
    assert domain_differences(shuffled, dense, DOMAINS) == rows


def test_a_domain_without_documents_in_the_table_has_no_row(tables):
    few = tables[1][tables[1]["doc"] < 2]
    assert [row["domain"] for row in domain_rows(few, DOMAINS, 2)] == ["code", "prose"]
    with pytest.raises(ValueError, match="same documents; these are of code, prose and of code, prose, sums"):
        domain_differences(few, tables[0], DOMAINS)
    with pytest.raises(ValueError, match="same documents"):
        domain_differences(tables[1][tables[1]["doc"] < 11], tables[0], DOMAINS)


def test_domains_of_other_documents_are_refused(tables):
    with pytest.raises(ValueError, match="this one has none.*dlr mixture"):
        domain_rows(tables[0], [], 2)
    with pytest.raises(ValueError, match="document 11.*of 6 documents"):
        domain_rows(tables[0], DOMAINS[:6], 2)


def rows_of(shift: float) -> list[dict]:
    return [{"domain": name, "nll_difference": place + shift, "low": place + shift - 0.2, "high": place + shift + 0.1}
            for place, name in enumerate(("code", "prose", "sums"))]


def test_the_figure_has_a_point_with_its_interval_for_every_row():
    rows = [{"target_skip": target, **row} for target in (0.25, 0.4) for row in rows_of(10 * target)]
    (axes,) = domains_against_static(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sums", "prose", "code"], "read from above"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["25 % asked", "40 % asked"]
    drawn = []
    for container in axes.containers:
        points, _, (bars,) = container.lines
        for x, y, ((low, _), (high, _)) in zip(*points.get_data(), bars.get_segments()):
            drawn.append((round(y), x, low, high))
    names = ["sums", "prose", "code"]
    expected = [(names.index(row["domain"]), row["nll_difference"], row["low"], row["high"]) for row in rows]
    np.testing.assert_allclose(sorted(drawn), sorted(expected))
    (alone,) = domains_against_static(rows_of(0)).axes
    assert not alone.figure.legends


def test_runs_that_have_domains_are_drawn_and_others_are_not(tmp_path):
    runs = {name: Run(tmp_path / name) for name in ("plain", "mixed")}
    runs["plain"].finish([{"variant": "base"}])
    runs["mixed"].finish([{"variant": "base"}], domains=rows_of(0.0))
    (tmp_path / "mixed" / "run.json").write_text(
        '{"settings": {"target_skip": 0.25, "model": "nano", "dataset": "mixture", "steps": 7}}')
    entry = registered()["pareto_domains_against_static"]
    expected = [{"target_skip": 0.25, **row} for row in rows_of(0.0)]
    assert entry.draw is domains_against_static
    assert entry.files(runs) == {"pareto_domains_nano_mixture_7": (expected,)}
    assert not entry.files({"plain": runs["plain"]})


def test_depth_by_domain_is_drawn_where_the_skip_is_known():
    entry = registered()["pareto_depth_by_domain"]
    rows = [{"target_skip": target, "skip": target + shift, **row} for target in (0.25, 0.4) for seed_shift in (-0.02, 0.02)
            for row, shift in zip(rows_of(0.0), (0.1 + seed_shift, seed_shift, -0.1 + seed_shift))]
    (axes,) = entry.draw(rows).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["code", "prose", "sums"]
    lines = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert lines["25 % asked"] == pytest.approx([65, 75, 85]) and lines["40 % asked"] == pytest.approx([50, 60, 70])
