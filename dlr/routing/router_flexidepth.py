"""FlexiDepth: a router a layer with soft weights, and an adapter for the tokens that skip it.

Luo et al. 2025, "Adaptive Layer-skipping in Pre-trained LLMs". A token whose gate g is above 1/2
runs the layer, whose update is weighed by g; another one takes the adapter, weighed by 1 - g.
Skipped tokens leave keys and values, as here. There is no noise: the weights carry the gradients.

Simplified: the router is a bottleneck of two linear maps; the adapter is the low-rank linear one of
all arms here, past the whole layer, where FlexiDepth has a small MLP in the MLP's place; the base's
LoRA is trained too. Its own loss on depth is the square of a token's summed gates, a price under
which the skip ratio is a result; here the controlled budget moves the threshold that g = 1/2 is at.
"""

import torch
from torch import nn

from dlr.routing.config import RouterConfig
from dlr.routing.router import Dense, hard_gates
from dlr.routing.router_layers import LayerRouter


class FlexiDepthRouter(LayerRouter):
    """Two linear maps a unit; g is the sigmoid of the logit less the threshold in force."""

    def gate_network(self, config: RouterConfig):
        return nn.Sequential(Dense(self.width, config.router_hidden), nn.GELU(),
                             Dense(config.router_hidden, 1))

    def build(self, config: RouterConfig) -> None:
        super().build(config)
        for net in self.net:      # logits spread by about 1, which noise does for other routers
            nn.init.normal_(net[-1].weight, std=2.5 / config.router_hidden**0.5)

    def step(self, hidden, unit, plan, threshold, temperature=None, noise=1.0):
        logit = self(hidden, unit)
        return hard_gates(logit, threshold), logit

    def paths(self, unit, x, ran, threshold):
        weight = torch.sigmoid(self(x, unit) - threshold).to(ran)
        return x + weight * (ran - x), x + (1 - weight) * (self.skipped(unit, x) - x)
