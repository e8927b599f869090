"""Elastic training: each sequence draws a skip ratio, or runs dense, so one run heals for all.

As in slimmable networks (Yu et al. 2019) and LayerDrop (Fan et al. 2020). A router's plans and a
static plan draw from the same distribution, so that both are healed alike.
"""

import torch

from dlr.routing.budget import threshold_at
from dlr.routing.plan import static_pair
from dlr.routing.policy import Policy, RouterPolicy

DENSE = 1 / 8                   # chance that a sequence runs everything
SKIPS = (0.05, 0.65)            # between which the others draw


def drawn_skips(rows: int) -> list[float]:
    """A skip ratio for each sequence of a batch."""
    dense, place = torch.rand(2, rows)
    skips = SKIPS[0] + (SKIPS[1] - SKIPS[0]) * place
    return torch.where(dense < DENSE, 0.0, skips).tolist()


class ElasticRouter(RouterPolicy):
    """The router's plan, at a price for each sequence; its calibration's curve gives the prices."""

    def threshold(self, routing, hidden):
        curve = routing.calibration.curve
        prices = [threshold_at(curve, skip) for skip in drawn_skips(len(hidden))]
        return torch.tensor(prices, device=hidden.device).view(-1, 1, 1)


class ElasticStatic(Policy):
    """The static plan along `order`, at a depth for each sequence."""

    def __init__(self, order: list[int]):
        self.order = order

    def __call__(self, routing, hidden, plan):
        gates = []
        for skip in drawn_skips(len(hidden)):
            fewer, more, share = static_pair(self.order, routing.units, skip)
            gates.append(more if torch.rand(()) < share else fewer)
        gates = torch.stack(gates).to(hidden.device)
        return gates.unsqueeze(1).expand(-1, hidden.shape[1], -1), None
