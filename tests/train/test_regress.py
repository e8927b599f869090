"""A depth router learns a harm that it can read, and nothing where there is nothing to read."""

import torch

from dlr.measure.labels import HarmLabels
from dlr.routing.config import RouterConfig
from dlr.routing.router_depth import DepthRouter
from dlr.train.regress import EPOCHS, regress

CONFIG = RouterConfig(router_class="DepthRouter", router_hidden=32)


def labels(count=3000, readable=True):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, 16, generator=generator)
    rate = (states[:, 0] if readable else torch.randn(count, generator=generator)).mul(0.7).exp()
    harm = rate[:, None] * torch.tensor([0.0, 0.1, 0.3, 0.8])
    empty = torch.empty(count, 0).bfloat16()
    numbers = torch.arange(count, dtype=torch.int32)
    return HarmLabels(states.bfloat16(), numbers % 50, numbers, numbers, harm, empty)


def test_a_readable_harm_is_learnt_and_noise_is_not():
    def explained(given):
        torch.manual_seed(0)
        return regress(DepthRouter(16, 3, CONFIG.changed(book_depth=1.0)), given, 60_000, 0)
    assert explained(labels()) > 0.6 > 0.1 > explained(labels(readable=False))


def test_few_labels_are_not_learnt_by_heart(monkeypatch):
    steps = []
    monkeypatch.setattr("dlr.train.regress._minimise", lambda *given: steps.append(given[3]))
    for count, visits in ((100, 10**6), (100, 500)):
        regress(DepthRouter(16, 3, CONFIG), labels(count)[torch.arange(count)], visits, 0)
    assert steps == [100 * EPOCHS, 500]


def test_unknown_harms_are_left_out():
    given = labels()
    torch.manual_seed(0)
    router = DepthRouter(16, 3, CONFIG.changed(book_depth=1.0))
    given.harm[::2, 1] = torch.nan
    given.harm[1::2, 2] = torch.nan
    assert regress(router, given, 60_000, 0) > 0.6
    harm = router.harm(given.states.float(), given.position)
    assert harm.isfinite().all() and (harm.mean(0).diff() > 0).all()
