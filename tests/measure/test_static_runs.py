"""What static plans share is computed once, and every KL is that of the plan run alone."""

import pytest
import torch
from test_ridge import batches

import dlr
from dlr.measure.instrument import costs, open_sample
from dlr.measure.static import greedy_order, greedy_order_by_kl
from dlr.measure.static_runs import StaticRuns
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan

PLANS = ([1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0])


@pytest.mark.parametrize("config", [{"keep_first_tokens": 1, "skip_adapter_rank": 3}, {"keep_first_tokens": 0},
                                    {"keep_first_tokens": 3}, {"keep_first_tokens": 1, "unit": "sublayer"}])
@torch.no_grad()
def test_shared_runs_equal_single_ones(llama, config):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, **config))
    if routing.router.skip is not None:
        for up in routing.router.skip.up:
            up.normal_(std=0.3)
    sample = open_sample(llama, routing, batches()[0])
    runs = StaticRuns(llama, routing, sample)
    for keep in (True, False):
        for plan in PLANS:
            gates = torch.tensor(plan, dtype=torch.float32).repeat_interleave(routing.units_per_layer)
            alone, _ = costs(llama, routing, sample, StaticPlan(gates))
            assert torch.allclose(runs.kl(gates, keep=keep), alone, atol=1e-5), plan
    assert not any("forward" in vars(layer) for layer in routing.layers) or routing.execution == "compact"


def test_fewer_layers_run(llama):
    routing = dlr.attach(llama, RouterConfig(always_keep=2))
    runs = StaticRuns(llama, routing, open_sample(llama, routing, batches()[0]))
    ran = []
    handles = [layer.mlp.register_forward_hook(lambda *_, _place=place: ran.append(_place))
               for place, layer in enumerate(routing.layers)]
    runs.kl(torch.tensor([1.0, 0, 1, 1]), keep=True)
    assert ran == [4, 5]
    ran.clear()
    runs.kl(torch.tensor([1.0, 0, 1, 0]))
    assert not ran
    for handle in handles:
        handle.remove()


def test_a_search_that_tries_few_finds_the_order_of_one_that_tries_all():
    worth = torch.rand(30, generator=torch.Generator().manual_seed(0))
    asked = []

    def harms(dropped, left):
        asked.append(len(left))
        return [float(worth[[*dropped, unit]].sum()) for unit in left]
    full = greedy_order(30, harms)
    asked.clear()
    assert greedy_order(30, harms, 5) == full == worth.argsort().tolist()
    assert asked == [30, *[5] * 25, 4, 3, 2, 1]


@torch.no_grad()
def test_the_order_by_kl_starts_with_the_least_harmful_layer(llama):
    routing = dlr.attach(llama, RouterConfig(always_keep=2))
    order = greedy_order_by_kl(llama, routing, batches(), 2)
    sample = open_sample(llama, routing, batches()[0])
    single = [costs(llama, routing, sample, StaticPlan(1 - torch.eye(4)[unit]))[0].sum() for unit in range(4)]
    assert order[0] == int(torch.stack(single).argmin()) and sorted(order) == [0, 1, 2, 3]


def test_an_interrupted_search_goes_on_from_its_last_round(tmp_path):
    worth = torch.rand(12, generator=torch.Generator().manual_seed(0))
    asked = []

    def harms(dropped, left, until=99):
        if len(dropped) == until:
            raise KeyboardInterrupt
        asked.append(len(dropped))
        return [float(worth[dropped].sum() + worth[unit]) for unit in left]

    whole = greedy_order(12, harms, 4)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        greedy_order(12, lambda *given: harms(*given, until=7), 4, tmp_path / "part.json")
    assert greedy_order(12, harms, 4, tmp_path / "part.json") == whole and asked == list(range(12))
