"""The oracle's plans are measured as wholes, beat the static plan on their sample, and mean what they say."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import half_skipping, tiny

from dlr.measure import oracle
from dlr.measure import probes
from dlr.measure.instrument import Instrument, open_sample, router_plan, single_skips
from dlr.measure.likelihood import frozen_base, kl_to_teacher, predicted
from dlr.routing.config import RouterConfig
from dlr.routing.policy import GivenPlan

CONFIG = RouterConfig(always_keep=2, keep_first_tokens=1)
DOCS = 6


def batch(seed=3, length=12, short=8):
    ids = torch.randint(2, 97, (DOCS, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    return {"input_ids": ids, "attention_mask": mask, "row": torch.arange(DOCS)}


def peaked():
    """A tiny model sharp enough that skipping a layer matters."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def instrument():
    model = peaked()
    routing = half_skipping(model, CONFIG)
    return Instrument(model, routing, open_sample(model, routing, batch(), (0, 2)))


def test_kl_and_loss_are_the_reference_ones(instrument):
    model, routing, sample, data = instrument.model, instrument.routing, instrument.sample, batch()
    plan = torch.rand(len(sample), 4, generator=torch.Generator().manual_seed(0)) < 0.5
    gates = sample.spread(plan)
    kl, loss = instrument.base(gates)
    real, ids = data["attention_mask"].bool(), data["input_ids"]
    with torch.no_grad():
        with frozen_base(model, routing):
            teacher = model(ids, attention_mask=real.long()).logits
        with routing.using(GivenPlan(gates)):
            student = model(ids, attention_mask=real.long()).logits
    full = torch.zeros(DOCS, 11)
    full[predicted(real)] = kl_to_teacher(student, teacher, real)
    assert torch.allclose(full[sample.free[:, :-1]], kl, atol=1e-4)
    assert torch.allclose(student.log_softmax(-1)[sample.free].gather(1, sample.target.unsqueeze(1)).squeeze(1), -loss,
                          atol=1e-4)
    assert len(sample) == predicted(real)[:, 1:].sum()


def test_reusing_earlier_layers_changes_nothing(instrument):
    plan = torch.rand(len(instrument.sample), 4, generator=torch.Generator().manual_seed(1)) < 0.6
    gates = instrument.sample.spread(plan)
    instrument.base(gates)
    quick = [instrument.without(gates, unit) for unit in range(4)]
    for unit in range(4):
        whole = plan.clone()
        whole[:, unit] = False
        slow = instrument.base(instrument.sample.spread(whole))
        assert torch.allclose(quick[unit][0], slow[0], atol=1e-6) and torch.allclose(quick[unit][1], slow[1], atol=1e-6)
    assert all("forward" not in vars(layer) for layer in instrument.routing.layers)


def test_full_depth_costs_nothing_and_an_idle_layer_has_no_benefit(instrument):
    kl, _ = instrument.base(instrument.sample.full(4))
    assert kl.abs().max() < 1e-4
    layer = instrument.routing.layers[3]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model, routing = instrument.model, instrument.routing
    again = Instrument(model, routing, open_sample(model, routing, batch()))
    harm, loss = single_skips(again)
    assert harm[:, 1].abs().max() < 1e-4 and loss[:, 1].abs().max() < 1e-4 < harm[:, 0].abs().mean()
    assert oracle.static_order([again])[0] == 1


def test_the_oracle_meets_its_budgets_and_grows_from_one_to_the_next(instrument):
    plans = oracle.greedy_oracle([instrument], [0.25, 0.5, 0.8])
    total = len(instrument.sample) * 4
    for skip, (plan,) in plans.items():
        assert (~plan).sum() == round(skip * total)
    assert not (plans[0.5][0] & ~plans[0.25][0]).any() and not (plans[0.8][0] & ~plans[0.5][0]).any()


def test_at_one_skip_the_oracle_takes_the_units_of_least_harm(instrument):
    harm, _ = single_skips(instrument)
    count = len(instrument.sample) // 4
    plan = oracle.greedy_oracle([instrument], [count / harm.numel()])[count / harm.numel()][0]
    least = harm.min(-1)
    chosen = least.values.argsort(stable=True)[:count]
    assert set(map(tuple, (~plan).nonzero().tolist())) == {(int(i), int(least.indices[i])) for i in chosen}


def test_the_oracle_is_no_worse_than_the_best_static_plan_and_skips_as_much_as_the_router(instrument):
    order = oracle.static_order([instrument])
    spread = router_plan(instrument, 0.0)
    table, plans = oracle.headroom([instrument], order, {0.3: -1.0, 0.5: 0.0})
    sums = table.groupby("budget")[["static", "routed", "oracle"]].sum()
    assert (sums["oracle"] < 0.95 * sums["static"]).all(), "by the plan itself: at equality it would be the static plan's"
    assert table[table["budget"] == 0.5]["skip"].iloc[0] == pytest.approx(1 - spread.float().mean().item())
    assert plans[0.5][0].sum() == spread.sum()
    assert table["tokens"].sum() == 2 * len(instrument.sample)
    rows = oracle.headroom_rows(table)
    assert [row["budget"] for row in rows] == [0.3, 0.5]
    assert all(row["oracle"] == pytest.approx(sums.loc[row["budget"], "oracle"] / row["tokens"]) for row in rows)


def test_captured_is_one_for_the_oracle_zero_for_the_static_plan_and_negative_below_it():
    table = pd.DataFrame({"static": [3.0, 5.0], "oracle": [1.0, 2.0]})
    assert oracle.captured(table.assign(routed=table["oracle"])) == pytest.approx(1.0)
    assert oracle.captured(table.assign(routed=table["static"])) == pytest.approx(0.0)
    assert oracle.captured(table.assign(routed=table["static"] + 1)) < 0
    assert np.isnan(oracle.captured(table.assign(oracle=table["static"], routed=1.0)))


def test_the_interval_of_the_captured_fraction_is_over_documents():
    rng = np.random.default_rng(0)
    static = rng.uniform(2, 4, 40)
    table = pd.DataFrame({"budget": 0.4, "skip": 0.4, "tokens": 10, "static": static, "oracle": static / 4,
                          "routed": static * rng.uniform(0.5, 0.9, 40)})
    wide, = oracle.headroom_rows(table)
    assert wide["captured_low"] < wide["captured"] < wide["captured_high"]
    narrow, = oracle.headroom_rows(table.assign(routed=static * 0.7))
    assert narrow["captured_low"] == pytest.approx(0.4) and narrow["captured_high"] == pytest.approx(0.4)


def test_padding_and_batching_change_no_kl(instrument):
    model, routing = instrument.model, instrument.routing
    data = batch()
    alone = {k: v[:1, :8] if v.ndim == 2 else v[:1] for k, v in data.items()}
    single = Instrument(model, routing, open_sample(model, routing, alone))
    plan = torch.tensor([1, 0, 1, 0])
    together = instrument.base(instrument.sample.spread(plan))[0]
    mine = instrument.sample.document == 0
    assert torch.allclose(single.base(single.sample.spread(plan))[0], together[mine], atol=1e-4)


def test_texts_without_a_choosing_token_are_refused():
    model = tiny()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=20))
    with pytest.raises(ValueError, match="shorter than keep_first_tokens"):
        open_sample(model, routing, batch())


def test_r2_of_a_linear_function_is_one_and_of_noise_about_zero():
    rng = np.random.default_rng(0)
    states, document = rng.normal(size=(600, 8)), np.repeat(np.arange(12), 50)
    goal = np.stack([states @ rng.normal(size=8), rng.normal(size=600)], 1)
    guess = probes.cross_fitted(states, goal, document, "linear")
    r2 = probes.r_squared(goal, guess)
    assert r2[0] > 0.99 and abs(r2[1]) < 0.08
    curved = np.abs(states[:, :1])
    linear, mlp = (probes.r_squared(curved, probes.cross_fitted(states, curved, document, kind))[0]
                   for kind in probes.PROBES)
    assert linear < 0.1 < 0.4 < mlp


def test_probes_are_not_fooled_by_what_only_a_document_shares():
    rng = np.random.default_rng(1)
    document = np.repeat(np.arange(12), 50)
    marks, worth = rng.normal(size=(12, 20)), rng.normal(size=12)
    goal = worth[document][:, None]
    guess = probes.cross_fitted(marks[document], goal, document, "linear")
    assert probes.r_squared(goal, guess)[0] < 0.5
    with pytest.raises(ValueError, match="too few"):
        probes.cross_fitted(marks[document], goal, document * 0)


def test_predictability_rows_have_intervals_around_their_mean():
    rng = np.random.default_rng(2)
    states, document = rng.normal(size=(400, 6)), np.repeat(np.arange(8), 50)
    rows = probes.predictability({2: states}, states[:, :3], document)
    assert [(r["depth"], r["probe"]) for r in rows] == [(2, "linear"), (2, "MLP")]
    assert all(r["r2_low"] <= r["r2"] <= r["r2_high"] and len(r["by_unit"]) == 3 for r in rows)
