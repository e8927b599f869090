"""Plans drawn by a document's name: batch size, order and padding change nothing."""

import hashlib
from collections.abc import Sequence

import torch

from dlr.routing.policy import MixedStaticPlan, Policy


def uniform_from(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def names_of(keys: Sequence[str], rows: int) -> Sequence[str]:
    """The documents' names, one a row of the batch; the rows' numbers where nobody named them.

    Raises:
        ValueError: as many names are there as another batch has rows.
    """
    if keys and len(keys) != rows:
        raise ValueError(f"{len(keys)} documents are named in `keys`, and the batch has {rows} "
                         "rows: give a name a row, or none.")
    return keys or [str(row) for row in range(rows)]


class StaticByDocument(MixedStaticPlan):
    """MixedStaticPlan drawn by document, so that both sentences of a minimal pair share a plan.

    Attributes:
        keys: the name of the document of each row of the batch; empty: the rows' numbers.
    """
    keys: Sequence[str] = ()

    def draws(self, hidden):
        numbers = [uniform_from(key) for key in names_of(self.keys, len(hidden))]
        return torch.tensor(numbers, dtype=torch.float64)


class RandomByDocument(Policy):
    """RandomPlan drawn by the document's name (as `StaticByDocument`'s) and the token's place."""
    keys: Sequence[str] = ()

    def __init__(self, skip: float):
        self.skip, self._drawn, self._uniform = skip, None, None

    def __call__(self, routing, hidden, plan):
        place = plan.position.clamp(min=0).cpu()
        longest = int(place.max()) + 1
        keys = tuple(names_of(self.keys, len(place)))
        if self._drawn != keys or self._uniform.shape[1] < longest:
            self._drawn, length = keys, 64 * -(-longest // 64)
            seeds = [int(uniform_from(key) * 2**53) for key in keys]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            self._uniform = torch.stack([torch.rand(length, routing.units, generator=generator)
                                         for generator in generators])
        gates = (self._uniform[torch.arange(len(place)).unsqueeze(1), place] >= self.skip).float()
        return gates.to(hidden.device), None
