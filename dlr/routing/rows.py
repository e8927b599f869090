"""Which rows of a forward pass a unit computes.

Notation: b batch, s sequence, d width, U routable units, n kept rows of the b * s, m the most kept
rows of a sequence, h query heads, e head width, k key positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dlr.routing.intercept import Standin

BLOCK = 64                         # query rows that share their keys in causal attention


@dataclass(frozen=True)
class Rows:
    """The kept rows of one unit.

    Attributes:
        flat: `[n]` places among the b * s rows, ascending.
        rest: `[b * s - n]` places of the others, ascending.
        padded: `[b, m]` the same as places in each sequence, filled up with 0.
        source: `[n]` places of the kept rows among the b * m padded ones.
        batch, length: b and s.
        blocks: (start, stop, keys): padded rows start to stop need only the first `keys` keys.
    """
    flat: torch.Tensor
    rest: torch.Tensor
    padded: torch.Tensor
    source: torch.Tensor
    batch: int
    length: int
    blocks: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def every(cls, batch: int, length: int, device) -> "Rows":
        """All rows."""
        flat = torch.arange(batch * length, device=device)
        places = torch.arange(length, device=device).expand(batch, -1)
        return cls(flat, flat[:0], places, flat, batch, length, ((0, length, length),))

    @classmethod
    def last(cls, batch: int, length: int, count: int, device) -> "Rows":
        """The last `count` rows of every sequence."""
        places = torch.arange(length - count, length, device=device).expand(batch, -1)
        flat = (places + length * torch.arange(batch, device=device).unsqueeze(1)).flatten()
        source = torch.arange(batch * count, device=device)
        earlier = torch.arange(batch * length, device=device).view(batch, length)[:, :-count]
        return cls(flat, earlier.flatten(), places, source, batch, length)

    @classmethod
    def none(cls, batch: int, length: int, device) -> "Rows":
        """No row."""
        rest = torch.arange(batch * length, device=device)
        return cls(rest[:0], rest, rest[:0].expand(batch, 0), rest[:0], batch, length)

    @property
    def count(self) -> int:
        return self.flat.shape[0]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, n, d]` of `x` `[b, s, d]`, or `[n, d]` of `x` `[b * s, d]`."""
        kept = x.reshape(-1, x.shape[-1]).index_select(0, self.flat)
        return kept if x.dim() == 2 else kept.unsqueeze(0)

    def scatter(self, kept: torch.Tensor, shape: tuple) -> torch.Tensor:
        """Zeros `[*shape, d]` with the kept rows `[..., n, d]` in their places."""
        out = kept.new_zeros(self.batch * self.length, kept.shape[-1])
        out.index_copy_(0, self.flat, kept.reshape(-1, kept.shape[-1]))
        return out.view(*shape, kept.shape[-1])

    def others(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, b * s - n, d]` of `x` `[b, s, d]`: the rows that are not kept."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.rest).unsqueeze(0)

    def woven(self, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """`[b, s, d]` of kept rows `[1, n, d]` and the others `[1, b * s - n, d]`."""
        if self.count == self.batch * self.length:
            return kept.view(self.batch, self.length, -1)
        out = others.new_empty(self.batch * self.length, others.shape[-1])
        out.index_copy_(0, self.flat, kept[0].to(out.dtype)).index_copy_(0, self.rest, others[0])
        return out.view(self.batch, self.length, -1)

    def positions(self, value):
        """A positional argument for the kept rows as one sequence.

        `[1 or b, s, ...]` becomes `[1, n, ...]`, and `[s]` becomes `[n]`.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.positions(part) for part in value)
        if value.dim() == 1:
            return value.index_select(0, self.flat % self.length)
        value = value.expand(self.batch, *value.shape[1:])
        value = value.reshape(self.batch * self.length, *value.shape[2:])
        return value.index_select(0, self.flat).unsqueeze(0)

    def by_sequence(self, query: torch.Tensor) -> torch.Tensor:
        """`[b, h, m, e]` of the kept rows `[1, h, n, e]` of all sequences."""
        if self.batch == 1:
            return query
        heads, width = query.shape[1], query.shape[3]
        out = query.new_zeros(self.padded.numel(), heads, width)
        out.index_copy_(0, self.source, query[0].transpose(0, 1))
        return out.view(self.batch, -1, heads, width).transpose(1, 2)

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        """`[b, h, m, e]` of all rows `[b, h, s, e]`: of queries, or of a mask's `[b, 1, s, k]`."""
        return x.gather(2, self.padded[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def in_one(self, out: torch.Tensor) -> torch.Tensor:
        """`[1, n, h, e]` of attention's output `[b, m, h, e]`."""
        if self.batch == 1:
            return out
        return out.flatten(0, 1).index_select(0, self.source).unsqueeze(0)


@torch.compiler.disable
def plan_rows(runs: torch.Tensor, real: torch.Tensor) -> list[Rows | None]:
    """Kept rows of each unit (None: every real token runs it). This is the pass's only host sync.

    Args:
        runs: `[b, s, U]` bool, False at padding, whose rows nobody needs.
        real: `[b, s]` bool, False at padding.
    """
    host = torch.cat([runs.permute(2, 0, 1), real.unsqueeze(0)]).to("cpu").numpy()
    kept = host[:-1]
    batch, length = real.shape
    rows: list[Rows | None] = [None] * len(kept)
    skipping = (kept != host[-1]).any((1, 2)).nonzero()[0]
    if not kept[skipping].any():           # whole layers, as in every step of one token
        none = Rows.none(batch, length, runs.device) if len(skipping) else None
        for index in skipping:
            rows[index] = none
        return rows
    unit, sequence, place = kept[skipping].nonzero()
    counts = np.bincount(unit * batch + sequence, minlength=len(skipping) * batch)
    # how many kept rows of the same sequence come before it
    rank = np.arange(len(unit)) - np.repeat(counts.cumsum() - counts, counts)
    counts = counts.reshape(-1, batch)
    width = counts.max(1)  # m of each unit
    source = sequence * width[unit] + rank
    begin = np.append(0, (batch * width).cumsum())  # of each unit's padded rows
    padded = np.zeros(begin[-1], dtype=np.int64)
    padded[begin[unit] + source] = place
    rest = (~kept[skipping]).reshape(len(skipping), -1).nonzero()[1]
    table = torch.from_numpy(np.concatenate([sequence * length + place, rest, source, padded]))
    runs_of = counts.sum(1)
    sizes = np.concatenate([runs_of, batch * length - runs_of, runs_of, batch * width]).tolist()
    columns = table.to(runs.device, non_blocking=True).split(sizes)  # one copy for all units
    for number, index in enumerate(skipping):
        flat, others, in_padded, places = columns[number::len(skipping)]
        blocks = _blocks(padded[begin[number]:begin[number + 1]].reshape(batch, -1))
        rows[index] = Rows(flat, others, places.view(batch, -1), in_padded, batch, length, blocks)
    return rows


def _blocks(padded: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Blocks of BLOCK rows, so that causal attention can leave out keys that none of them sees."""
    count = padded.shape[1]
    starts = list(range(0, count, BLOCK))
    needed = np.maximum.reduceat(padded.max(0), starts) + 1 if count else starts
    return tuple((start, min(start + BLOCK, count), int(keys))
                 for start, keys in zip(starts, needed))


def selective(module: nn.Module, rows: Rows, width: int, extras: dict):
    """`module`'s forward for `rows` alone: gather, compute, scatter. Other rows come out as zeros.

    `extras` remembers how many further outputs the module has (an MLP of experts returns its
    router's choices), because a pass in which no row runs must return as many.
    """
    standin = Standin.of(module)               # one that another thread put there, if any
    original = module.forward if standin is None else standin.own

    def forward(x, *args, **kwargs):
        shape = x.shape[:-1]
        if not rows.count and module in extras:
            return _joined(x.new_zeros(*shape, width), (None,) * extras[module])
        if not rows.count:
            out = original(x, *args, **kwargs)
        else:
            has_rows = [isinstance(arg, torch.Tensor) and arg.shape[:-1] == shape for arg in args]
            args = [rows.gather(arg) if gathers else arg for arg, gathers in zip(args, has_rows)]
            out = original(rows.gather(x), *args, **kwargs)
        first, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        extras[module] = len(others)
        scattered = rows.scatter(first, shape) if rows.count else x.new_zeros(*shape, width)
        return _joined(scattered, others)

    return forward


def _joined(first: torch.Tensor, others: tuple):
    return (first, *others) if others else first
