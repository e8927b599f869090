"""Closed forms of routed and static plans, skip adapters and router networks, against torch's counter."""

import pytest
import torch
from tiny_models import scattered
from torch.utils.flop_counter import FlopCounterMode

import dlr
from dlr.measure.evaluate import calibrate_router
from dlr.measure.flops import added_weights, adapter_flops, plan_flops_per_token, router_flops
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan

pytestmark = pytest.mark.usefixtures("by_rows")

ADAPTED = RouterConfig(router_class="DepthRouter", always_keep=2, keep_first_tokens=1, book_depth=0.75,
                       router_hidden=24, skip_adapter_rank=3)
WIDTH, LENGTH = 32, 40


def counted(model) -> int:
    """FLOPs of a text; eager attention, for the counter sees no other. Keys owed to the cache are made."""
    ids = torch.randint(2, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert all(layer.keys.shape[2] == LENGTH for layer in model(ids).past_key_values.layers)
    return counter.get_total_flops()


@pytest.fixture
def routing(llama):
    llama.set_attn_implementation("eager")
    routing = scattered(llama, ADAPTED)
    ids = torch.randint(2, 97, (8, 14), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(8)}]
    calibrate_router(llama, routing, batches, 0.4)
    return routing


def test_a_routed_plan_with_adapters_costs_what_the_counter_counts(llama, routing):
    found, rate = counted(llama), routing.plan.keep_rate.tolist()
    assert 0.2 < routing.plan.skip_ratio < 0.6
    whole = LENGTH * plan_flops_per_token(llama.config, LENGTH, rate, 2, router=routing.router)
    assert found == pytest.approx(whole, rel=1e-3)
    network = LENGTH * 2 * (33 * 24 + 24 * 24 + 24 * (routing.router.plans - 1))
    assert network == LENGTH * router_flops(routing.router)
    past = LENGTH * sum(1 - kept for kept in rate) * 4 * WIDTH * 3
    bare = LENGTH * plan_flops_per_token(llama.config, LENGTH, rate, 2)
    assert whole == pytest.approx(bare + network + past) and min(network, past) > 0.005 * whole


def test_a_static_plan_with_adapters_pays_for_them_and_for_no_router(llama, routing):
    gates = torch.tensor([1.0, 0, 1, 0])
    with routing.using(StaticPlan(gates)):
        found = counted(llama)
    rate = routing.plan.keep_rate.tolist()
    assert rate == pytest.approx([1, 1 / LENGTH, 1, 1 / LENGTH]), "the first token runs every layer"
    expected = LENGTH * plan_flops_per_token(llama.config, LENGTH, rate, 2, router=routing.router, asked=False)
    assert found == pytest.approx(expected, rel=1e-3)
    bare = LENGTH * plan_flops_per_token(llama.config, LENGTH, rate, 2)
    assert expected - bare == pytest.approx(2 * (LENGTH - 1) * 4 * WIDTH * 3)


def test_rows_say_what_their_plan_carries(llama, routing):
    adapters = 4 * (2 * 3 * WIDTH + 3)
    network = 33 * 24 + 24 * 24 + 24 * (routing.router.plans - 1) + 24 + 24 + routing.router.plans - 1
    for kind, expected in (("routed", (adapters, network)), ("shuffled", (adapters, network)), ("static", (adapters, 0)),
                           ("random", (adapters, 0)), ("dense", (0, 0)), ("base", (0, 0))):
        found = added_weights(routing.router, kind)
        assert (found["adapter_parameters"], found["router_parameters"]) == expected, kind
        assert found["added_bytes"] == 4 * sum(expected)


def test_without_adapters_a_skipped_layer_costs_nothing_more(llama):
    assert adapter_flops(dlr.attach(llama, RouterConfig(always_keep=2)).router) == 0
