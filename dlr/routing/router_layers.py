"""Routers that decide on each layer from the state before it: what the rules of others share.

Published systems mostly decide so; a depth router decides once, after layer K. Files beside this
one hold one published rule each. All of them leave a skipped token's keys and values behind
(kv='complete'), as every plan here does unless it is told otherwise.
"""

import torch
from torch import nn

from dlr.routing.config import RouterConfig
from dlr.routing.router import Dense, Router
from dlr.routing.skip import normed


class LayerRouter(Router):
    """RMSNorm and a small network a unit, asked with the state that the unit is about to change."""
    ahead = False

    def build(self, config: RouterConfig) -> None:
        self.net = nn.ModuleList(self.gate_network(config) for _ in range(self.units))
        for net in self.net:
            nn.init.normal_(net[-1].weight, std=0.01)
            nn.init.constant_(net[-1].bias, config.keep_bias)

    def gate_network(self, config: RouterConfig) -> nn.Sequential:
        """The network of one unit, from d inputs to one logit; its last layer is a `Dense`."""
        return nn.Sequential(Dense(self.width, 1))

    @classmethod
    def sizes(cls, tensors):
        units = {name.split(".")[1] for name in tensors if name.startswith("net.")}
        first = min((name for name in tensors if name.startswith("net.0.")
                     and name.endswith(".weight")), default=None)
        return (1 if first is None else tensors[first].shape[-1]), max(1, len(units))

    def forward(self, hidden: torch.Tensor, unit: int) -> torch.Tensor:
        """Logits `[b, s, 1]` (float32) of `unit`, from states `[b, s, d]` before it."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net[unit](normed(hidden))
