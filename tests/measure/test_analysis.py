"""Statistics of token records: limits where the right answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy
from test_categories import of_text

from dlr.figures.analysis import category_depth
from dlr.measure import analysis
from dlr.measure.record import Record

RNG = np.random.default_rng(0)


def record_with(gates: np.ndarray, texts=("a b c d e f", "g h i j k l m")) -> Record:
    """A record whose plan is `gates` [n, U]; n is cut to the texts' tokens."""
    from dataclasses import replace
    record = of_text(*texts)
    gates = torch.from_numpy(gates[:len(record)]).bool()
    gates[record.position == 0] = True
    return replace(record, gates=gates, loss_routed=record.loss_dense + 1, entropy_dense=record.loss_dense.clone(),
                   logits=gates.float() * 40 - 20)


LONG = tuple(" ".join("the cat sat on 12 mats, and then left".split() * 4) for _ in range(4))


@pytest.fixture(scope="module")
def varied():
    n = len(of_text(*LONG))
    return record_with(RNG.random((n, 4)) < 0.6, LONG)


def test_information_is_the_entropy_where_the_label_decides_and_zero_for_a_constant_depth():
    labels = RNG.integers(0, 4, 4000)
    sure = analysis.mutual_information(labels, labels * 2 + 1)
    assert sure["information"] == pytest.approx(entropy(np.bincount(labels), base=2)) and sure["explained"] > 0.99
    constant = analysis.mutual_information(labels, np.ones(4000))
    assert constant["information"] == pytest.approx(0.0) and constant["explained"] == 0.0


def test_information_by_chance_is_recognised_as_such():
    labels, depth = RNG.integers(0, 40, 600), RNG.integers(0, 8, 600)
    found = analysis.mutual_information(labels, depth)
    assert found["information"] > 0.1 and abs(found["explained"]) < 0.02
    document = np.repeat(np.arange(6), 100)             # a label that is the document, a depth set by the document
    by_document = analysis.mutual_information(document, document % 3, document)
    assert by_document["excess"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_variance_shares_add_up_to_one_and_survive_shuffling(seed):
    rng = np.random.default_rng(seed)
    gates = rng.random((200, 6)) < rng.random((200, 1)) * rng.random((1, 6))
    shares = analysis.variance_shares(gates)
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) >= 0
    shuffled = analysis.variance_shares(gates[rng.permutation(200)])
    assert shuffled == pytest.approx(shares)


def test_variance_shares_at_their_limits():
    static = np.tile([1, 0, 1, 1], (50, 1))
    assert analysis.variance_shares(static)["layers"] == pytest.approx(1.0)
    all_or_none = np.repeat([[1], [0]], 25, 0) * np.ones((1, 4))
    assert analysis.variance_shares(all_or_none)["tokens"] == pytest.approx(1.0)
    which = np.array([[1, 0], [0, 1]] * 25)
    assert analysis.variance_shares(which)["within"] == pytest.approx(1.0)
    assert np.isnan(analysis.variance_shares(np.ones((5, 3)))["layers"])


def test_explained_variance_is_one_for_a_lookup_table_and_about_zero_for_noise():
    labels = RNG.integers(0, 50, 2000)
    assert analysis.explained_variance(labels.astype(float), labels) == pytest.approx(1.0)
    noise = [analysis.explained_variance(np.random.default_rng(s).normal(size=2000), labels) for s in range(10)]
    assert abs(np.mean(noise)) < 0.01


def test_collapse_is_flagged_and_a_living_router_is_not(varied):
    n = len(varied)
    assert analysis.collapse(varied)["flags"] == []
    dead = analysis.collapse(record_with(np.tile([1, 0, 1, 0], (n, 1)), LONG))
    assert dead["flags"] == ["one plan for nearly all tokens", "no unit is routed by token"]
    assert dead["always"] == [0, 2] and dead["never"] == [1, 3] and dead["plan_entropy_bits"] == 0
    assert dead["gate_entropy_nats"] == pytest.approx(0, abs=1e-4)
    assert "every layer always runs" in analysis.collapse(record_with(np.ones((n, 4)), LONG))["flags"]


def test_agreement_is_whole_with_the_static_plan_itself(varied):
    static = record_with(np.tile([1, 0, 1, 0], (len(varied), 1)), LONG)
    assert analysis.agreement_with_static(static, [1, 3, 0, 2]) == pytest.approx(1.0)
    assert analysis.agreement_with_static(static, [0, 2, 1, 3]) == pytest.approx(0.0)
    assert 0.3 < analysis.agreement_with_static(varied, [1, 3, 0, 2]) < 0.8


def test_category_rows_are_their_tokens_means(varied):
    member = pd.DataFrame({"even": np.arange(len(varied)) % 2 == 0, "none": np.zeros(len(varied), bool)})
    table = analysis.by_category(varied, member).set_index("category")
    mine = analysis.free(varied) & member["even"].to_numpy()
    assert table.loc["even", "active_layers"] == pytest.approx(varied.active_layers.numpy()[mine].mean())
    assert table.loc["even", "low"] <= table.loc["even", "active_layers"] <= table.loc["even", "high"]
    assert table.loc["even", "loss_routed"] == pytest.approx(table.loc["even", "loss_dense"] + 1)
    assert table.loc["all", "tokens"] == len(varied) - 4 and table.loc["none", "tokens"] == 0
    keep = table.loc["all"].filter(like="keep_").astype(float)
    assert 2 + keep.sum() == pytest.approx(table.loc["all", "active_layers"])


def test_rank_correlation_knows_order_and_its_absence():
    document, x = np.repeat(np.arange(20), 50), RNG.normal(size=1000)
    assert analysis.rank_correlation(x, np.exp(x), document)["correlation"] == pytest.approx(1.0)
    assert analysis.rank_correlation(x, -x**3, document)["correlation"] == pytest.approx(-1.0)
    noise = analysis.rank_correlation(x, RNG.normal(size=1000), document)
    assert noise["low"] < 0 < noise["high"]
    assert np.isnan([analysis.rank_correlation(x, np.ones(1000), document)[k] for k in ("correlation", "low", "high")]).all()
    holes = np.where(np.arange(1000) % 3 == 0, np.nan, x)
    assert analysis.rank_correlation(x, holes, document)["tokens"] == np.sum(~np.isnan(holes))


def test_benefits_are_seen_where_gates_follow_them():
    benefit = RNG.normal(size=(800, 3))
    gates = np.stack([benefit[:, 0] > 0, benefit[:, 1] < 0, RNG.random(800) < 0.5], 1)
    table = analysis.benefit_correlations(gates, benefit, np.repeat(np.arange(16), 50)).set_index("measure")
    assert table.loc["unit 0", "low"] > 0.5 and table.loc["unit 1", "high"] < -0.5
    assert abs(table.loc["unit 2", "correlation"]) < 0.15


def test_position_buckets_cover_every_deciding_token_once(varied):
    table = analysis.by_position(varied)
    assert table["tokens"].sum() == analysis.free(varied).sum()
    assert table["first"].tolist() == [2**k for k in range(len(table))]
    assert (table["first"].iloc[1:].to_numpy() == table["last"].iloc[:-1].to_numpy() + 1).all()


def test_the_same_word_is_constant_for_a_lookup_table_and_varies_for_noise(varied):
    ids = varied.ids.numpy()
    lookup = record_with((np.arange(4)[None] <= (ids % 4)[:, None]), LONG)
    table, shares = analysis.same_word(lookup, 4)
    assert (table["sd"] == 0).all() and shares["token"] == pytest.approx(1.0)
    noisy, shares = analysis.same_word(varied, 4)
    assert noisy["sd"].max() > 0.3 and abs(shares["token"]) < 0.3


def test_records_reload_and_are_drawn_without_a_model(varied, tmp_path):
    varied.save(tmp_path / "record")
    again = Record.load(tmp_path / "record")
    from dlr.measure.categories import categories
    pd.testing.assert_frame_equal(analysis.by_category(again, categories(again)),
                                  analysis.by_category(varied, categories(varied)))
    figure = category_depth(analysis.by_category(again, categories(again)))
    assert len(figure.axes) == 3
