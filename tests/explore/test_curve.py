"""The harm curve of the card: a depth router's prediction, its price line touching at the plan the token runs."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from test_views import Page
from tiny_models import DEPTH, half_skipping, scattered

from dlr.explore import html as views
from dlr.explore.curve import HEIGHT, WIDTH, harm_curve
from dlr.explore.export import to_csv, to_json
from dlr.explore.session import Session
from dlr.measure.record import Record
from dlr.routing.budget import threshold_for
from dlr.routing.policy import StaticPlan

TEXT = "A few words, of which each token takes its own depth: <b>some</b> more, some less."


@pytest.fixture
def session(model, tokenizer):
    routing = scattered(model, DEPTH)
    session = Session(model=model, tokenizer=tokenizer)
    routing.calibration.threshold = threshold_for(session.read(TEXT).logits[1:], 0.4)
    return session


def points(path: str) -> torch.Tensor:
    """Places of an SVG path `[n, 2]`."""
    return torch.tensor([[float(number) for number in pair.split()] for pair in re.findall(r"[ML]([^ML]+)", path)])


def test_the_price_line_touches_the_curve_at_the_plan_that_is_run(session):
    record = session.read(TEXT)
    chosen = set()
    for i in range(1, len(record)):
        drawn = harm_curve(record, i)
        curve, (start, end) = points(drawn.curve), points(drawn.line)
        assert len(curve) == len(record.meta["depths"]) == record.harm.shape[1]
        height = start[1] + (end[1] - start[1]) * curve[:, 0] / WIDTH        # of the line, below each plan
        assert (curve[:, 1] <= height + 0.2).all(), "no plan lies under it"
        plan = record.meta["depths"].index(int((~record.gates[i]).sum()))
        assert abs(curve[plan, 1] - height[plan]) < 0.2 and drawn.chosen == pytest.approx(curve[plan].tolist())
        slope = (start[1] - end[1]) / HEIGHT * drawn.top / drawn.deepest
        assert float(slope) == pytest.approx(record.meta["threshold"], abs=0.2 * drawn.top / HEIGHT)
        assert torch.allclose(HEIGHT * (1 - record.harm[i] / drawn.top), curve[:, 1], atol=0.1)
        chosen.add(plan)
    assert len(chosen) > 2
    first = harm_curve(record, 0)
    assert first.line == "" and first.chosen == (0.0, HEIGHT) and "at any price" in first.said


def test_a_record_holds_the_router_s_own_harms_once(session, tmp_path, monkeypatch):
    router, asked = session.routing.router, []
    harm = type(router).harm
    monkeypatch.setattr(type(router), "harm", lambda self, *given: asked.append(1) or harm(self, *given))
    record = session.read(TEXT)
    assert len(asked) == 1
    assert torch.allclose(router.logits(record.harm), record.logits) and (record.harm[:, 0] == 0).all()
    again = Record.load(record.save(tmp_path / "text"))
    assert torch.equal(again.harm, record.harm) and again.meta["depths"] == record.meta["depths"]
    rows = json.loads(to_json(record))["tokens"]
    assert rows[3]["predicted_harm"] == record.harm[3].tolist() and "predicted_harm_2" in to_csv(record)


def test_the_dial_moves_the_line_without_the_model(session):
    record = session.read(TEXT)
    i = len(record) // 2
    dear, free = record.at_threshold(1e3), record.at_threshold(-math.inf)
    assert harm_curve(free, i).line == "" and "every gate is open" in harm_curve(free, i).said
    deep = f"with {record.meta['depths'][-1]} units dropped"
    assert deep in harm_curve(dear, i).said and deep not in harm_curve(record.at_threshold(0.0), i).said
    assert harm_curve(dear, i).top == pytest.approx(float(record.harm[i].max()))


def test_cards_show_the_curve_and_say_its_numbers(session):
    record = session.read(TEXT)
    seen = views.view(record)
    page = Page(seen)
    assert not page.open and page.tags.count("desc") == len(record)
    cards = seen.split("<span class=dlr-card")[1:]
    for i, card in enumerate(cards):
        assert harm_curve(record, i).words in card and f'd="{harm_curve(record, i).curve}"' in card
    assert f"{record.meta['depths'][2]}: {float(record.harm[4, 2]):.3g}" in page.text


def test_no_curve_where_no_depth_router_made_the_plan(session, model, tokenizer):
    record = session.read(TEXT)
    static = session.read(TEXT, policy=StaticPlan(torch.tensor([1.0, 0, 1, 0])))
    assert static.harm is None and "depths" not in static.meta and harm_curve(static, 3) is None
    assert harm_curve(replace(record, meta=record.meta | {"policy": "ShuffledPlan"}), 3) is None
    session.routing.detach()
    half_skipping(model)
    other = Session(model=model, tokenizer=tokenizer).read(TEXT)
    assert other.harm is None and "<desc" not in views.view(other)


def test_the_cost_line_counts_adapters_under_any_plan_and_the_router_under_its_own(model, tokenizer):
    router = scattered(model, DEPTH.model_copy(update={"skip_adapter_rank": 3})).router
    session = Session(model=model, tokenizer=tokenizer)
    own, static = session.read(TEXT), session.read(TEXT, policy=StaticPlan(torch.tensor([1.0, 0, 1, 0])))
    with_adapters = [session.flops(record).flops_routed for record in (own, static)]
    adapters, router.skip = router.skip, None
    bare = [session.flops(record).flops_routed for record in (own, static)]
    router.skip = adapters
    for record, more, less in zip((own, static), with_adapters, bare):
        assert more - less == pytest.approx(int((~record.gates).sum()) * 2 * 2 * 32 * 3)
    network = 2 * (33 * 128 + 128 * 128 + 128 * 3)
    given = replace(own, meta=own.meta | {"policy": "GivenPlan"})
    assert with_adapters[0] - session.flops(given).flops_routed == pytest.approx(len(own) * network)
