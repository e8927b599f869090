"""Skip adapters: a low-rank linear stand-in for a layer's update, applied where it is skipped.

Adapters on the skip path are the largest effect that the field has measured (DiffSkip, FlexiDepth,
ReplaceMe). `dlr.measure.ridge` fits them in closed form; training may go on from there. They belong
to every plan alike: routed, static and random ones carry past a skipped layer what these give.
"""

import torch
import torch.nn.functional as F
from torch import nn


def normed(x: torch.Tensor) -> torch.Tensor:
    """States `[..., d]` with a mean square of 1, in float32: those of real models reach 20,000.

    What routers and adapters read, and what `dlr.measure.ridge` fits adapters on.
    """
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class SkipAdapters(nn.Module):
    """One adapter a unit: `x + up (down rmsnorm(x) + shift)`; x itself as long as `up` is zero.

    Attributes:
        down `[r, d]`, shift `[r]`, up `[d, r]` of each of the U units, as parameter lists.
    """

    def __init__(self, width: int, units: int, rank: int):
        super().__init__()
        self.rank = rank
        down = (torch.randn(rank, width) / width**0.5 for _ in range(units))
        self.down = nn.ParameterList(map(nn.Parameter, down))
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros(rank)) for _ in range(units))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(units))

    def forward(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """What `[..., d]` states become past the skipped `unit`."""
        down, shift = self.down[unit].to(x.dtype), self.shift[unit].to(x.dtype)
        inner = F.linear(normed(x).to(x.dtype), down, shift)
        return x + F.linear(inner, self.up[unit].to(x.dtype))
