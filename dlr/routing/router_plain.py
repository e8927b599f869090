"""The predecessor's router: a small network on the raw state before layer K.

Its two hidden layers are a half and a quarter as wide as the model. No norm stands before it, and
no gradient goes through it to the layers below. Its gate is open where the sigmoid of its logit is
above a half: with `gumbel_noise=0` training draws the same gates, straight through.
"""

import torch
from torch import nn

from dlr.routing.config import RouterConfig
from dlr.routing.router import Dense, Router


class PlainRouter(Router):
    """Three linear layers with GELU between, on the state as it is."""

    def build(self, config: RouterConfig) -> None:
        half, quarter = max(1, self.width // 2), max(1, self.width // 4)
        self.net = nn.Sequential(Dense(self.width, half), nn.GELU(), Dense(half, quarter),
                                 nn.GELU(), Dense(quarter, self.units))
        nn.init.normal_(self.net[-1].weight, std=0.02)
        nn.init.constant_(self.net[-1].bias, config.keep_bias)

    def forward(self, hidden: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net(hidden.detach().float())
