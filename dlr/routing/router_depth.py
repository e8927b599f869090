"""The depth router: it predicts the harm of each plan of a nested book, and a token takes the plan
with the least harm + price * units run.

Its logits are prices (see `book.prices`), so that gates, calibration and dial are those of every
router, and one router serves every budget. `dlr.train.regress` fits it to measured harms; trained
end to end, each token draws one plan (a categorical variable over the M plans, of lower variance
than U Bernoullis).

Notation: d width, U routable units, M plans.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F

from dlr.routing.book import book_gates, depths_of, prices, steps_of
from dlr.routing.config import RouterConfig
from dlr.routing.router import Router, network
from dlr.routing.skip import normed

KEPT = 1e4           # nats: the price of a unit that every plan of the book runs
LEAST = -12.0        # log of the least harm that is told apart from none


class DepthRouter(Router):
    """A network from the state before layer K and the position to M - 1 log-harms.

    Attributes:
        depths: `[M]` units that each plan drops; plan 0 drops none, and has no harm.
        order: `[U]` the units as the book drops them, first to last; from the deepest layer upwards
            until `set_order` is told a better one.
        center, scale: `[d + 1]` of the network's inputs, see `set_inputs`.
    """

    # inputs that are blanked, for controls: 'state' or 'position'
    blind: ClassVar[str] = ""

    def build(self, config: RouterConfig) -> None:
        depths = depths_of(self.units, config.book_plans, config.book_depth)
        self.plans = len(depths)
        self.net = network(self.width + 1, config.router_hidden, self.plans - 1)
        self.dropout = 0.0           # of hidden activations, while it is regressed
        self.register_buffer("depths", torch.tensor(depths, dtype=torch.float32), persistent=False)
        order = list(range(self.units))[::-1]
        self.register_buffer("order", torch.tensor(order))
        steps = torch.tensor(steps_of(order, depths))
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("center", torch.zeros(self.width + 1))
        self.register_buffer("scale", torch.ones(self.width + 1))
        with torch.no_grad():       # harm that rises with depth: a fresh router starts by keeping
            self.net[-1].weight.normal_(std=0.01)
            rising = torch.linspace(0, 1, self.plans)[1:].log()
            self.net[-1].bias.copy_(rising + math.log(max(config.keep_bias, 1e-3)))

    def set_order(self, order: list[int]) -> None:
        """Makes the book that of another static order, a permutation of the U units."""
        if sorted(order) != list(range(self.units)):
            raise ValueError(f"A book's order names each of the {self.units} routable units once; "
                             f"{order} does not.")
        self.order.copy_(torch.tensor(order))
        self._find_steps()

    def _find_steps(self) -> None:
        depths = [int(depth) for depth in self.depths.tolist()]
        self.steps.copy_(torch.tensor(steps_of(self.order.tolist(), depths)))

    def load_weights(self, tensors, adapters_only=False):
        super().load_weights(tensors, adapters_only)
        self._find_steps()

    @classmethod
    def sizes(cls, tensors):
        inputs, units = (tensors[name].numel() if name in tensors else 1
                         for name in ("center", "order"))
        return max(1, inputs - 1), max(1, units)

    @property
    def gates(self) -> torch.Tensor:
        """The book's plans `[M, U]`, 1 = run."""
        return book_gates(self.steps, self.plans)

    # -- prediction -------------------------------------------------------------------------------
    def inputs(self, hidden: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
        """The network's inputs `[..., d + 1]`: the normed state and the log of the position."""
        x = normed(hidden)
        if position is None:
            position = torch.zeros(x.shape[:-1], device=x.device)
        place = position.to(x.device).float().clamp(min=0).log1p().unsqueeze(-1)
        if self.blind == "state":
            x = torch.zeros_like(x)
        elif self.blind == "position":
            place = torch.zeros_like(place)
        return torch.cat([x, place], -1)

    def set_inputs(self, inputs: torch.Tensor) -> None:
        """Centers and scales the network's inputs as those of `inputs` `[n, d + 1]`."""
        self.center.copy_(inputs.mean(0))
        self.scale.copy_(inputs.std(0) + 1e-3)

    def log_harm(self, hidden: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
        """Logs of the predicted harms `[..., M - 1]` of plans 1 to M - 1."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = (self.inputs(hidden, position) - self.center) / self.scale
            for layer in self.net[:-1]:
                x = layer(x)
                if self.dropout and not hasattr(layer, "weight"):
                    x = F.dropout(x, self.dropout)
            return self.net[-1](x).clamp(LEAST, -LEAST)

    def harm(self, hidden: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """Predicted harms `[..., M]` in nats: KL from the dense model under each plan."""
        return F.pad(self.log_harm(hidden, position).exp(), (1, 0))

    def judged(self, hidden, position):
        harm = self.harm(hidden, position)
        return harm, self.logits(harm)

    def forward(self, hidden, position=None):
        return self.judged(hidden, position)[1]

    def logits(self, harm: torch.Tensor) -> torch.Tensor:
        """The price `[..., U]` of each unit, from harms `[..., M]`."""
        priced = F.pad(prices(harm, self.depths), (0, 1), value=KEPT)
        return priced[..., self.steps]

    def draw(self, hidden, position, threshold, temperature, noise=1.0):
        harm = self.harm(hidden, position)
        price = torch.as_tensor(threshold, device=harm.device, dtype=harm.dtype)
        # In units of depth: a Gumbel then blurs a token's choice by about one unit, at any price.
        score = -(harm / price.clamp(min=1e-6) + (self.units - self.depths))
        if noise:
            score = score - noise * (-torch.rand_like(score).clamp(1e-6, 1 - 1e-6).log()).log()
        soft = (score / temperature).softmax(-1)
        hard = F.one_hot(score.argmax(-1), self.plans).to(soft)
        gates = (hard + soft - soft.detach()) @ self.gates
        dense = (price <= 0).expand_as(gates[..., :1])
        return torch.where(dense, torch.ones_like(gates), gates), self.logits(harm)


class PositionRouter(DepthRouter):
    """A control: it reads the position alone."""
    blind = "state"
