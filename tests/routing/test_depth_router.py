"""A depth router's plans are the book's, its logits are prices, and one threshold is one price."""

import pytest
import torch
from tiny_models import DEPTH, scattered, tiny

import dlr
from dlr.measure.evaluate import calibrate_router, evaluate, skip_ratio
from dlr.routing.book import book_gates, depths_of, prices, steps_of
from dlr.routing.budget import threshold_at
from dlr.routing.config import RouterConfig
from dlr.routing.elastic import ElasticRouter, ElasticStatic, drawn_skips
from dlr.routing.policy import RouterPolicy
from dlr.routing.router_depth import KEPT

def batches(count=4, length=14):
    ids = torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(count)}]


def test_a_book_is_nested_and_reaches_from_nothing_to_its_depth():
    assert depths_of(26, 12, 0.9) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert depths_of(12, 12, 0.9) == list(range(12)) and depths_of(1, 12, 0.5) == [0, 1]
    gates = book_gates(torch.tensor(steps_of([2, 0, 3, 1], [0, 1, 3])), 3)
    assert gates.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0]]


def test_prices_give_the_plan_of_least_harm_and_cost():
    """At any price, as many steps are priced at it or below as the best plan takes."""
    generator = torch.Generator().manual_seed(0)
    depths = torch.tensor([0, 1, 2, 4, 6, 9, 12.0])
    harm = torch.rand(500, 7, generator=generator) * 3
    harm[:, 0] = 0
    slopes = prices(harm, depths)
    assert (slopes.diff() >= -1e-6).all()
    for price in (0.01, 0.05, 0.1, 0.2, 0.5):
        assert torch.equal((slopes <= price).sum(1), (harm - price * depths).argmin(1))


def test_every_token_takes_a_plan_of_the_book(llama, ids):
    routing = scattered(llama)
    book = {tuple(gates) for gates in routing.router.gates.int().tolist()}
    calibrate_router(llama, routing, batches(), 0.4)
    llama(ids)
    taken = {tuple(gates) for gates in routing.plan.gates[:, 1:].flatten(0, 1).int().tolist()}
    assert taken <= book and len(taken) > 1
    assert (routing.plan.logits[..., 1] == KEPT).all()         # no plan of the book drops it


def test_one_calibration_serves_every_budget(llama):
    routing = scattered(llama)
    text = batches(40)
    calibrate_router(llama, routing, text, 0.3)
    for skip in (0.0, 0.1, 0.3, 0.5, 0.6):
        with routing.at(threshold=threshold_at(routing.calibration.curve, skip)):
            assert abs(skip_ratio(evaluate(llama, routing, text, RouterPolicy(), bar=False)) - skip) < 0.02


def test_position_is_read_and_padding_is_not(llama):
    routing = scattered(llama)
    ids = torch.randint(2, 97, (1, 10))
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 3).long()[None]
    with torch.no_grad():
        llama(ids)
        alone = routing.plan.logits
        llama(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert torch.allclose(routing.plan.logits[:, 3:], alone, atol=1e-4)
        hidden = torch.randn(1, 1, 32)
        early, late = (routing.router(hidden, torch.tensor([[place]])) for place in (1, 100))
    assert not torch.allclose(early, late)


def test_drawn_plans_are_of_the_book_and_teach_the_router(llama):
    routing = scattered(llama)
    router, hidden = routing.router, torch.randn(5, 40, 32)
    gates, logits = router.draw(hidden, torch.arange(40).expand(5, 40), 0.5, 1.0)
    book = {tuple(row) for row in router.gates.int().tolist()}
    assert {tuple(row) for row in gates.detach().round().int().flatten(0, 1).tolist()} <= book
    still, _ = router.draw(hidden, None, 0.5, 1.0, noise=False)
    assert torch.equal(still.detach().round(), (router(hidden) > 0.5).float())
    (gates * torch.randn_like(gates)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.net.parameters())
    dense, _ = router.draw(hidden, None, torch.tensor([-1.0] + [0.5] * 4).view(-1, 1, 1), 1.0)
    assert (dense[0] == 1).all() and not (dense[1:] == 1).all()


def test_files_bring_book_and_inputs_back(tmp_path):
    model = tiny()
    routing = scattered(model)
    routing.router.center.fill_(0.1)
    dlr.save_pretrained(model, tmp_path / "c")
    other = tiny()
    dlr.from_pretrained(tmp_path / "c", other)
    again = dlr.routing_of(other).router
    assert torch.equal(again.steps, routing.router.steps) and again.order.tolist() == [2, 0, 3, 1]
    hidden = torch.randn(2, 3, 32)
    assert torch.equal(again(hidden), routing.router(hidden))


def test_an_order_that_is_none_is_refused(llama):
    with pytest.raises(ValueError, match="each of the 4 routable units once"):
        dlr.attach(llama, DEPTH).router.set_order([0, 1, 1, 2])


def test_elastic_plans_draw_a_depth_a_sequence(llama):
    torch.manual_seed(0)
    skips = drawn_skips(4000)
    assert 0.1 < skips.count(0.0) / 4000 < 0.15 and 0.05 <= min(filter(None, skips)) and max(skips) <= 0.65
    routing = scattered(llama)
    calibrate_router(llama, routing, batches(40), 0.3)
    ids = torch.randint(2, 97, (64, 14))
    with torch.no_grad():
        for policy in (ElasticStatic([2, 0, 3, 1]), ElasticRouter()):
            with routing.using(policy):
                llama(ids)
            skipped = 1 - routing.plan.gates[:, 1:].mean((1, 2))
            assert (skipped == 0).any() and skipped.max() > 0.4 and len(skipped.unique()) > 3
