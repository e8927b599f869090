"""Budgets are hit: calibration, the controller, static plans at an exact ratio."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import half_skipping, tiny

import dlr
from dlr.base.data import load_documents
from dlr.base.models import load_base
from dlr.measure import logits
from dlr.measure.evaluate import (bootstrap, calibrate_router, evaluate, paired_difference,
                                  perplexity, skip_ratio, summary)
from dlr.measure.static import evaluate_static, greedy_order, greedy_order_by_kl
from dlr.routing.budget import Controller, threshold_for
from dlr.routing.config import RouterConfig
from dlr.routing.plan import static_gates, static_pair
from dlr.routing.policy import LayerDrop, RandomPlan, RouterPolicy, StaticPlan


def batches(count=12, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, count, 4):
        mask = torch.ones(4, length, dtype=torch.long)
        mask[0, length - 5:] = 0
        out.append({"input_ids": torch.randint(2, 97, (4, length), generator=generator), "attention_mask": mask,
                    "row": torch.arange(start, start + 4)})
    return out


@pytest.mark.parametrize("target", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_calibration_meets_its_target_on_its_own_text(target):
    logits = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    threshold = threshold_for(logits, target)
    assert (logits <= threshold).float().mean().item() == pytest.approx(target, abs=1e-4)


def test_forced_gates_count_and_can_make_a_target_unreachable():
    logits = torch.randn(90, 1, generator=torch.Generator().manual_seed(0))
    assert (logits <= threshold_for(logits, 0.5, forced=10)).sum() == 50
    with pytest.raises(ValueError, match="10 of 100 gates always run"):
        threshold_for(logits, 0.95, forced=10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_for(logits, 1.4)
    with pytest.raises(ValueError, match="at least one document"):
        threshold_for(torch.zeros(0, 3), 0.4)


def test_raising_the_target_never_lowers_the_measured_skip():
    model = tiny()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=1))
    measured = []
    for target in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        calibrate_router(model, routing, batches(), target)
        table = evaluate(model, routing, batches(seed=1), RouterPolicy())
        measured.append(skip_ratio(table))
        assert skip_ratio(evaluate(model, routing, batches(), RouterPolicy())) == pytest.approx(target, abs=2e-3)
    assert measured == sorted(measured) and measured[0] < 0.05 < 0.7 < measured[-1]


def test_the_dial_follows_its_curve_and_never_turns_back():
    model = tiny()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=1))
    calibrate_router(model, routing, batches(48), 0.4)
    own, measured = routing.threshold, []
    for skip in (0.0, 0.05, 0.123, 0.4, 0.6, 0.8):
        with dlr.budget(model, skip=skip):
            measured.append(skip_ratio(evaluate(model, routing, batches(48), RouterPolicy())))
        assert measured[-1] == pytest.approx(skip, abs=0.01)
    assert measured == sorted(measured) and measured[0] == 0.0
    assert routing.threshold == own


def test_texts_alone_are_enough_to_calibrate():
    model, tokenizer = load_base()
    routing = half_skipping(model)
    texts = load_documents("embedded", "calibration").texts[:4]
    with pytest.raises(ValueError, match=r"dlr\.calibrate"), dlr.budget(model, skip=0.3):
        pass
    skip = dlr.calibrate(model, tokenizer, texts, 0.3, max_len=48)
    assert skip == routing.calibration.skip == pytest.approx(0.3, abs=0.02)
    with dlr.budget(model, skip=0.3) as dialled:
        assert dialled.threshold == pytest.approx(routing.calibration.threshold, abs=0.05)


def test_settings_hold_for_the_block_and_the_thread():
    routing = half_skipping(tiny())
    before = [getattr(routing, name) for name in ("policy", "threshold", "strategy", "execution", "decode_plan")]
    change = {"policy": None, "threshold": 3.0, "strategy": "two_pass", "execution": "compact", "decode_plan": "prompt"}
    seen = []
    with pytest.raises(KeyError), routing.at(**change):
        assert [getattr(routing, name) for name in change] == list(change.values())
        with routing.at(threshold=1.0):
            assert routing.threshold == 1.0 and routing.strategy == "two_pass"
        thread = threading.Thread(target=lambda: seen.extend(getattr(routing, name) for name in change))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == before == [getattr(routing, name) for name in change]
    with pytest.raises(ValueError, match="strategy='both' is not one of single_pass, two_pass"), routing.at(strategy="both"):
        pass
    routing.threshold = 2.0
    assert routing.threshold == 2.0 and routing.calibration.threshold == before[1]
    routing.threshold = None
    assert routing.threshold == before[1]


def test_the_dial_says_what_it_cannot_do():
    model = tiny()
    routing = half_skipping(model)
    with pytest.raises(ValueError, match="no calibration curve"), dlr.budget(model, skip=0.3):
        pass
    calibrate_router(model, routing, batches(), 0.4)
    for wrong in (-0.1, 0.9):
        with pytest.raises(ValueError, match="outside the dial"), dlr.budget(model, skip=wrong):
            pass
    routing.detach()
    with pytest.raises(dlr.NotRoutable, match="No router"), dlr.budget(model, skip=0.3):
        pass


def test_the_controller_reaches_its_goal_on_a_drifting_router():
    controller, threshold = Controller(0.4, rate=1.0, ramp_steps=20), 0.0
    generator = torch.Generator().manual_seed(0)
    skips = []
    for step in range(80):
        logits = 2.0 + 0.02 * step + torch.randn(512, 12, generator=generator)
        skips.append((logits <= threshold).float().mean().item())
        threshold = controller.update(threshold, skips[-1], step)
    assert controller.goal(0) == pytest.approx(0.02) and controller.goal(40) == 0.4
    assert sum(skips[-20:]) / 20 == pytest.approx(0.4, abs=0.03)


def test_the_controller_makes_good_its_share_of_the_miss_in_one_step():
    def skip_at(threshold):
        return 0.1 + 0.05 * threshold
    for rate, left in ((1.0, 0.0), (0.5, 0.5)):
        threshold = Controller(0.4, rate).update(0.0, skip_at(0.0), 0, slope=0.05)
        assert 0.4 - skip_at(threshold) == pytest.approx(left * 0.3)
    assert Controller(0.4).update(0.0, 0.1, 0, slope=0.0) == pytest.approx(6.0), "bounded where every gate is certain"


@pytest.mark.parametrize("skip", [0.2, 0.33, 0.5, 0.9])
def test_static_plans_mix_to_an_exact_ratio(skip):
    model = tiny()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=0))
    table = evaluate_static(model, routing, batches(), [2, 0, 3, 1], skip, 0.0)
    assert skip_ratio(table) == pytest.approx(skip, abs=1e-6)
    pair = static_pair([2, 0, 3, 1], 4, skip)
    assert (pair.fewer - pair.more).sum() == 1 and 0 <= pair.share_more <= 1
    assert (1 - pair.mean(pair.fewer, pair.more).mean()).item() == pytest.approx(skip)


def test_greedy_search_drops_what_does_least_harm_beside_what_is_dropped_already():
    """Unit 0 is harmless until unit 2, its stand-in, is gone: harms of single units alone would drop it second."""
    asked = []

    def harms(dropped, left):
        for unit in left:
            asked.append((*dropped, unit))
            yield {0: 9.0 if 2 in dropped else 1.0, 1: 5.0, 2: 0.5}[unit]

    assert greedy_order(3, harms) == [2, 1, 0]
    assert asked == [(0,), (1,), (2,), (2, 0), (2, 1), (2, 1, 0)]


def test_greedy_search_finds_the_layer_that_does_nothing():
    model = tiny()
    with torch.no_grad():
        for part in (model.model.layers[4].self_attn.o_proj, model.model.layers[4].mlp.down_proj):
            part.weight.zero_()
    routing = half_skipping(model, RouterConfig(always_keep=2))
    order = greedy_order_by_kl(model, routing, batches(), candidates=0)
    with routing.using(StaticPlan(static_gates(4, [2]))):
        idle = evaluate(model, routing, batches(), StaticPlan(static_gates(4, [2])))
    assert sorted(order) == [0, 1, 2, 3]
    dense = evaluate(model, routing, batches(), None)
    assert idle["nll"].sum() == pytest.approx(dense["nll"].sum(), rel=1e-6)
    assert order[0] == 2


def test_random_plan_and_layer_drop_hit_their_rates():
    model = tiny()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=0))
    assert skip_ratio(evaluate(model, routing, batches(48), RandomPlan(0.3))) == pytest.approx(0.3, abs=0.04)
    torch.manual_seed(0)
    with routing.using(LayerDrop(0.5)):
        model(batches()[0]["input_ids"])
    assert torch.equal(routing.plan.gates, routing.plan.gates[:, :1].expand_as(routing.plan.gates))
    with routing.using(LayerDrop(0.5, "linear", "token")):
        model(torch.arange(2, 82).view(2, 40))
    gates = routing.plan.gates[:, :, -4:]
    assert len(gates[0].unique(dim=0)) > 4, "each token draws by itself"
    assert (gates == 0).float().mean((0, 1)).diff().gt(-0.1).all(), "deeper units are dropped more"


def test_logits_made_in_chunks_give_the_same_table(monkeypatch):
    model = tiny()
    routing = half_skipping(model)
    whole = evaluate(model, routing, batches(), RouterPolicy(), kl=True)
    monkeypatch.setattr(logits, "ELEMENTS", 97 * 4 * 3)                  # three places of four texts at a time
    assert len(logits.chunks(model, 15, 4)) == 5
    pd.testing.assert_frame_equal(evaluate(model, routing, batches(), RouterPolicy(), kl=True), whole, rtol=1e-6)


def test_tables_are_a_row_a_document_and_intervals_hold_the_value():
    model = tiny()
    routing = half_skipping(model)
    table = evaluate(model, routing, batches(), RouterPolicy(), kl=True)
    assert list(table["doc"]) == list(range(12))
    row = summary(table, 2)
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
    assert row["active_layers"] == pytest.approx(2 + 4 * (1 - row["skip"]))
    assert row["kl"] > 0
    same = paired_difference(table, table)
    assert same == {"nll_difference": 0.0, "low": 0.0, "high": 0.0}
    assert bootstrap(table, lambda sums: sums["nll"]) == bootstrap(table, lambda sums: sums["nll"])
    drawn = np.random.default_rng(0).integers(0, 12, (1000, 12))                # each draw's own documents, summed
    means = [table["nll"].iloc[places].sum() / table["tokens"].iloc[places].sum() for places in drawn]
    assert bootstrap(table, lambda sums: sums["nll"] / sums["tokens"]) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
