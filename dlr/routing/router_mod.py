"""Mixture-of-Depths: each layer picks the tokens it runs, the best k of a whole sequence.

Raposo et al. 2024, "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
models". The k-th best score depends on tokens that come later, so that the rule is not causal:
while a text is generated it cannot be followed, and a likelihood under it has seen what it
predicts. It stands in tables as an upper bound on what it could do, and its rows say so.

Simplified: every routable layer picks, not every other one; k is a share of the sequence that the
controlled budget and the calibration choose, as for all routers here; a token that is not picked
passes the skip adapter and leaves keys and values, and attention sees all tokens, not the picked
ones alone (kv='drop' is nearer to the paper). Its own remedies for sampling (an auxiliary loss, or
a predictor of who will be picked) are left out.
"""

import torch

from dlr.routing.config import RouterConfig
from dlr.routing.router import hard_gates
from dlr.routing.router_layers import LayerRouter


class MoDRouter(LayerRouter):
    """One linear score a layer, by which tokens are ranked and the layer's update is weighed.

    A score starts at `keep_bias`, so that 1 leaves the pretrained layers as they are.

    A unit's logit is the logit of a token's rank among the real tokens of its row, so that a
    threshold t keeps the same number of tokens in every layer: all but the share sigmoid(t).
    Gradients reach the scores through the weights alone.
    """
    causal = False

    def build(self, config: RouterConfig) -> None:
        super().build(config)
        self.first_tokens = config.keep_first_tokens      # they run in any case, and count in k

    def step(self, hidden, unit, plan, threshold, temperature=None, noise=1.0):
        with torch.no_grad():
            score = self(hidden, unit).squeeze(-1)
            score = score.masked_fill(plan.position < self.first_tokens, torch.inf)
            score = score.masked_fill(~plan.real, -torch.inf)
            padding = (~plan.real).sum(1, keepdim=True)          # it has the lowest ranks
            rank = score.argsort(dim=1, stable=True).argsort(1) - padding
            share = (rank + 0.5) / (score.shape[1] - padding).clamp(min=1)
            logits = share.clamp(1e-6, 1 - 1e-6).logit().unsqueeze(-1)
        return hard_gates(logits, threshold), logits

    def paths(self, unit, x, ran, threshold):
        weight = self(x, unit).to(ran)
        return x + weight * (ran - x), self.skipped(unit, x)
