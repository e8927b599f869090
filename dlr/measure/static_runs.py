"""Many static plans on one sample: what a plan shares with others is computed once.

A layer before the first change gives back what it computed under the plan before. A layer that no
choosing token runs is not run: the tokens that run it all the same, forced ones at the start of a
text, see one another alone and run every layer, so that they leave it as they do at full depth.

Notation: n tokens that choose, U routable layers.
"""

import contextlib

import torch

from dlr.measure.instrument import Sample, costs, giving, recording
from dlr.routing.handle import Routing
from dlr.routing.policy import StaticPlan


class StaticRuns:
    """KL under static plans on one sample; exact, and the same as `costs` gives.

    Args:
        routing: a handle whose units are layers.

    Attributes:
        plan: gates `[U]` of the plan whose outputs are at hand.
    """

    def __init__(self, model, routing: Routing, sample: Sample):
        self.model, self.routing, self.sample = model, routing, sample
        self.plan = torch.ones(routing.units)
        self.outputs: list = []
        self.full: list = []
        if routing.units_per_layer == 1:
            self.kl(self.plan, keep=True)
            self.full = self.outputs

    def kl(self, gates: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """KL `[n]` from the dense model under the plan `gates` `[U]`.

        Args:
            keep: hold this plan's outputs for the plans that follow, in the place of the last ones.
        """
        routing = self.routing
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(routing.autocast())
            if routing.units_per_layer == 1:
                stack.enter_context(routing.at(execution="masked"))
                for place, known in self._known(gates).items():
                    stack.enter_context(giving(routing.layers[place], known))
            recorded = stack.enter_context(recording(routing.layers)) if keep else None
            kl, _ = costs(self.model, routing, self.sample, StaticPlan(gates))
        if keep:
            self.plan, self.outputs = gates.clone(), recorded
        return kl

    def _known(self, gates: torch.Tensor) -> dict:
        """Place of a layer -> its output, of the layers that need not run under `gates`."""
        if not self.outputs:
            return {}
        changed = (gates != self.plan).nonzero().flatten().tolist()
        first = self.routing.first
        until = first + changed[0] if changed else len(self.outputs)
        known = dict(enumerate(self.outputs[:until]))
        for unit, gate in enumerate(gates.tolist()):
            if not gate and self.full:
                known.setdefault(first + unit, self.full[first + unit])
        return known
