"""Where gates come from: the router itself, or one of the plans it is compared with.

A policy maps the states before layer K, `[b, s, d]`, to gates `[b, s, U]` (and logits, where it has them).
"""

import weakref

import torch

from dlr.router import hard_gates, straight_through_gates


class Policy:
    """A source of gates. `reads_hidden` tells the two-pass strategy whether a first pass is needed."""
    reads_hidden = False

    def __call__(self, routing, hidden: torch.Tensor, current) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError


class RouterPolicy(Policy):
    """The router's own plan: noisy and differentiable while `training`, deterministic otherwise."""
    reads_hidden = True

    def __init__(self, training: bool = False, temperature: float = 1.0, noise: bool = True):
        self.training, self.temperature, self.noise = training, temperature, noise
        self._sequence_logits: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(self, routing, hidden, current):
        config = routing.config
        logits = routing.router(hidden) if config.level == "token" else self._pooled(routing, hidden, current)
        if self.training:
            gates = straight_through_gates(logits, config.threshold, self.temperature, self.noise)
            if config.level == "sequence":
                gates = gates[:, :1].expand_as(gates)         # one draw a sequence
        else:
            gates = hard_gates(logits, config.threshold)
        if config.level == "sequence":
            pooled = (current.position < config.pool_tokens).unsqueeze(-1)
            gates = torch.where(pooled, torch.ones_like(gates), gates)
        return gates, logits

    def _pooled(self, routing, hidden, current) -> torch.Tensor:
        """Sequence level: logits from the mean state of the first tokens, which therefore run every layer themselves.

        Pooling the whole sequence, as the original did, would let later tokens decide how earlier ones are computed.
        A cached continuation uses the decision made when its cache was begun.
        """
        if current.cache is not None and current.cache in self._sequence_logits:
            logits = self._sequence_logits[current.cache]
        else:
            pool = (current.real & (current.position < routing.config.pool_tokens)).unsqueeze(-1).to(hidden.dtype)
            logits = routing.router((hidden * pool).sum(1) / pool.sum(1).clamp(min=1)).unsqueeze(1)
            if current.cache is not None:
                self._sequence_logits[current.cache] = logits
        return logits.expand(*hidden.shape[:2], -1)


class StaticPlan(Policy):
    """One gate vector `[U]` for every token."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates.float()

    def __call__(self, routing, hidden, current):
        if self.gates.shape != (routing.units,):
            raise ValueError(f"A static plan for this model has {routing.units} gates; {tuple(self.gates.shape)} given.")
        return self.gates.to(hidden.device).expand(*hidden.shape[:2], -1), None


class MixedStaticPlan(Policy):
    """In training, each sequence draws one of two neighbouring static plans, so that their mean meets the budget."""

    def __init__(self, fewer: torch.Tensor, more: torch.Tensor, share_more: float):
        self.plans, self.share_more = torch.stack([fewer, more]).float(), share_more

    def __call__(self, routing, hidden, current):
        draw = (torch.rand(hidden.shape[0], device=hidden.device) < self.share_more).long()
        gates = self.plans.to(hidden.device)[draw]
        return gates.unsqueeze(1).expand(-1, hidden.shape[1], -1), None


class RandomPlan(Policy):
    """Every token keeps every unit with probability 1 - skip, from a seeded generator of its own."""

    def __init__(self, skip: float | torch.Tensor, seed: int = 0):
        self.skip, self.generator = skip, torch.Generator().manual_seed(seed)

    def __call__(self, routing, hidden, current):
        draw = torch.rand(*hidden.shape[:2], routing.units, generator=self.generator)
        return (draw >= self.skip).float().to(hidden.device), None


class LayerDrop(Policy):
    """Stochastic depth (Huang et al. 2016; Fan et al. 2020): each sequence drops each unit with probability p."""

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, routing, hidden, current):
        gates = (torch.rand(hidden.shape[0], 1, routing.units, device=hidden.device) >= self.probability).float()
        return gates.expand(-1, hidden.shape[1], -1), None


class ShuffledPlan(Policy):
    """The router's plan, dealt out again among the batch's real tokens: same rates, no token-dependence."""
    reads_hidden = True

    def __init__(self, seed: int = 0):
        self.router, self.generator = RouterPolicy(), torch.Generator().manual_seed(seed)

    def __call__(self, routing, hidden, current):
        gates, logits = self.router(routing, hidden, current)
        movable = current.real & (current.position >= routing.config.keep_first_tokens)
        gates = gates.clone()
        rows = gates[movable]
        gates[movable] = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]
        return gates, logits


class GivenPlan(Policy):
    """Gates `[b, s, U]` made beforehand, for this very batch."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates.float()

    def __call__(self, routing, hidden, current):
        expected = (*hidden.shape[:2], routing.units)
        if tuple(self.gates.shape) != expected:
            raise ValueError(f"This plan has shape {tuple(self.gates.shape)}; the pass needs [b, s, units] = {expected}.")
        return self.gates.to(hidden.device), None
