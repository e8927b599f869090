"""The record of one forward pass: which tokens ran which layers.

Notation: b batch, s sequence, R routable layers (U = R units, or 2R where attention and MLP are gated apart).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass
class Plan:
    """Gates of one forward pass.

    Attributes:
        gates: `[b, s, U]`, 1 = run. In training they carry gradients (straight-through).
        logits: `[b, s, U]` router logits, or None for plans that no router made.
        real: `[b, s]` bool, False at padding; padding never counts.
        always_keep: layers every token ran before the routable ones.
    """
    gates: torch.Tensor
    logits: torch.Tensor | None
    real: torch.Tensor
    always_keep: int
    units_per_layer: int = 1

    def __repr__(self) -> str:
        batch, length, units = self.gates.shape
        return f"Plan({batch} x {length} tokens, {units} units, {self.skip_ratio:.1%} skipped)"

    @property
    def kept(self) -> torch.Tensor:
        """Hard gates of real tokens, `[n, U]` float."""
        return (self.gates.detach()[self.real] > 0.5).float()

    @property
    def keep_rate(self) -> torch.Tensor:
        """Mean gate over real tokens, one number a unit `[U]`."""
        return self.kept.mean(0)

    @property
    def skip_ratio(self) -> float:
        """1 - mean gate over real tokens and routable units."""
        return 1.0 - self.kept.mean().item()

    @property
    def active_layers(self) -> torch.Tensor:
        """Layers each token ran, `[b, s]` (halves where attention and MLP are gated apart)."""
        return self.always_keep + (self.gates.detach() > 0.5).sum(-1) / self.units_per_layer

    @property
    def budget(self) -> torch.Tensor:
        """Mean gate over real tokens and units, a scalar with gradients."""
        return self.gates[self.real].mean()


def gate_entropy(probabilities: torch.Tensor) -> float:
    """Mean binary entropy of keep probabilities (any shape), in nats; 0 when every decision is certain."""
    p = probabilities.detach().float().clamp(1e-6, 1 - 1e-6)
    return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())


def static_gates(units: int, dropped: list[int]) -> torch.Tensor:
    """The static gate vector `[U]` that drops the given units."""
    gates = torch.ones(units)
    gates[dropped] = 0.0
    return gates


class StaticPair(NamedTuple):
    """Two neighbouring static plans `[U]`, and the share of the second whose mixture skips what was asked for."""
    fewer: torch.Tensor
    more: torch.Tensor
    share_more: float

    def mean(self, under_fewer, under_more):
        """What is expected where each document runs the second plan with probability `share_more`."""
        return under_fewer * (1 - self.share_more) + under_more * self.share_more


def static_pair(order: list[int], units: int, skip: float, forced: float = 0.0) -> StaticPair:
    """Two neighbouring static plans along `order`, whose mean skip ratio is `skip`.

    `forced` is the share of tokens that run everything whatever the plan (kept first tokens).

    Raises:
        ValueError: no static plan skips as much.
    """
    exact = skip * units / (1 - forced)
    if units < exact < units * (1 + 1e-6):                # a router that closes every gate, but for rounding
        exact = float(units)
    if not 0 <= exact <= units:
        raise ValueError(f"A skip ratio of {skip} needs {exact:.2f} units dropped; this model has {units}.")
    whole = min(int(exact), units - 1)
    return StaticPair(static_gates(units, order[:whole]), static_gates(units, order[:whole + 1]), exact - whole)
