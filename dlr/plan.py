"""The record of one forward pass: which tokens ran which layers.

Notation: b batch, s sequence, R routable layers (U = R units, or 2R where attention and MLP are gated apart).
"""

from dataclasses import dataclass

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
