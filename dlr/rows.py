"""Which rows of a forward pass a part of a layer computes, and how a family's own modules are made to compute only them.

Notation: b batch, s sequence, d width, U routable units, n kept rows of the b * s, m the most kept rows of a sequence,
h query heads, k key positions.
"""

import inspect
import sys
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

ATTENTION_NAME = "dlr_rows"        # what routable attention modules find as their attention function while a plan runs
_INTERCEPTED = ("sdpa", "eager")   # attention functions that take any mask; others see every query row
BLOCK = 64                         # query rows that share their keys in causal attention
_ACTIVE = threading.local()


@dataclass(frozen=True)
class Rows:
    """The kept rows of one unit.

    Attributes:
        flat: `[n]` places among the b * s rows, ascending.
        padded: `[b, m]` the same as places in the sequence, one row of indices a sequence, filled up with 0.
        source: `[n]` places of the kept rows among the b * m padded ones.
        batch, length: b and s. offset: rows in front of every sequence that only fill the cache (see `shifted`).
        blocks: (start, stop, keys) of stretches of the padded rows, none of which needs more than the first `keys` keys.
    """
    flat: torch.Tensor
    padded: torch.Tensor
    source: torch.Tensor
    batch: int
    length: int
    offset: int = 0
    blocks: tuple[tuple[int, int, int], ...] = ()

    @property
    def count(self) -> int:
        return self.flat.shape[0]

    def shifted(self, by: int) -> "Rows":
        """The same rows where every sequence has `by` more rows in front, of which none is kept."""
        if not by:
            return self
        sequence = torch.div(self.flat, self.length, rounding_mode="floor")
        return Rows(self.flat + by * (sequence + 1), self.padded + by, self.source, self.batch, self.length + by,
                    by)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, n, d]` of `x` `[b, s, d]`, or `[n, d]` of `x` `[b * s, d]`."""
        kept = x.reshape(-1, x.shape[-1]).index_select(0, self.flat)
        return kept if x.dim() == 2 else kept.unsqueeze(0)

    def scatter(self, kept: torch.Tensor, shape: tuple) -> torch.Tensor:
        """Zeros `[*shape, d]` with the kept rows `[..., n, d]` in their places."""
        out = kept.new_zeros(self.batch * self.length, kept.shape[-1])
        return out.index_copy_(0, self.flat, kept.reshape(-1, kept.shape[-1])).view(*shape, kept.shape[-1])


def plan_rows(gates: torch.Tensor, real: torch.Tensor) -> list[Rows | None]:
    """Kept rows of each unit; None where every real token runs the unit. The forward pass's only host sync is here.

    Args:
        gates: `[b, s, U]`, 1 = run; real: `[b, s]` bool, False at padding, whose rows nobody needs.
    """
    runs = (gates > 0.5).permute(2, 0, 1)
    host = torch.cat([runs, real.unsqueeze(0)]).to("cpu").numpy()
    present, (batch, length) = host[-1], real.shape
    tables: list[tuple[np.ndarray, ...] | None] = []
    for unit in host[:-1]:
        if (unit | ~present).all():
            tables.append(None)
            continue
        flat = np.flatnonzero(unit & present)
        if not len(flat):                                # most units of most decode steps
            tables.append((flat, np.zeros((batch, 0), dtype=np.int64), flat))
            continue
        sequence, place = np.divmod(flat, length)
        counts = np.bincount(sequence, minlength=batch)
        rank = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        padded = np.zeros((batch, counts.max()), dtype=np.int64)
        padded[sequence, rank] = place
        tables.append((flat, padded, sequence * padded.shape[1] + rank))
    blocks = [() if table is None else _blocks(table[1]) for table in tables]
    parts = [part.ravel() for table in tables if table for part in table]
    if not parts:
        return [None] * len(tables)
    moved = iter(torch.from_numpy(np.concatenate(parts)).to(gates.device, non_blocking=True).split([p.size for p in parts]))
    return [None if table is None else
            Rows(next(moved), next(moved).view(batch, -1), next(moved), batch, length, blocks=block)
            for table, block in zip(tables, blocks)]


def _blocks(padded: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Stretches of BLOCK rows, so that attention under a mask need not see the keys behind them all."""
    count = padded.shape[1]
    return tuple((start, min(start + BLOCK, count), int(padded[:, start:start + BLOCK].max()) + 1)
                 for start in range(0, count, BLOCK))


# -- modules that compute kept rows only ------------------------------------------------------------------------------
def selective(module: nn.Module, width: int):
    """`module`'s forward for the rows in force: gather, compute, scatter. Other rows come out as zeros.

    Args:
        width: the module's output width, needed where no row is kept.
    """
    def forward(x, *args, **kwargs):
        rows: Rows = _ACTIVE.rows[module]
        own = _ACTIVE.own[module]
        lead = x.shape[:-1]
        if not rows.count:
            return x.new_zeros(*lead, width)
        args = [rows.gather(a) if isinstance(a, torch.Tensor) and a.shape[:-1] == lead else a for a in args]
        return rows.scatter(own(rows.gather(x), *args, **kwargs), lead)

    return forward


def rows_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention for the kept query rows over all keys, by the implementation the model was loaded with.

    query `[b, h, s, e]`, key and value `[b, h', k, e]`, mask `[b, 1, s, k]` or None. Returns `[b, s, h, e]`, zeros at
    rows not kept, and no weights.
    """
    rows, own = _ACTIVE.rows[module], _ACTIVE.attention
    batch, _, length, _ = query.shape
    if not rows.count:
        return query.new_zeros(batch, length, query.shape[1], value.shape[-1]), None
    place = rows.padded
    kept = query.gather(2, place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if attention_mask is not None and attention_mask.shape[2] > 1:
        row = (place - rows.offset).clamp(min=0)[:, None, :, None]
        shape = (batch, attention_mask.shape[1], place.shape[1], attention_mask.shape[3])
        attention_mask = attention_mask.expand(batch, -1, -1, -1).gather(2, row.expand(shape))
    if attention_mask is None and length > 1 and not rows.offset and own is ALL_ATTENTION_FUNCTIONS["sdpa"]:
        # no mask means causal there, from the first key on
        out = _causal(module, own, kept, key, value, rows, kwargs)
    else:
        out, _ = own(module, kept, key, value, attention_mask, **kwargs)
    full = rows.scatter(out.flatten(0, 1).flatten(1).index_select(0, rows.source), (batch, length))
    return full.view(batch, length, *out.shape[2:]), None


def _causal(module, own, query, key, value, rows: Rows, kwargs: dict) -> torch.Tensor:
    """Causal attention of kept rows `[b, h, m, e]`, a block at a time over the keys that block can see."""
    parts, places = [], torch.arange(rows.length, device=query.device)
    for start, stop, seen in rows.blocks:
        mask = (places[:seen] <= rows.padded[:, start:stop, None]).unsqueeze(1)
        parts.append(own(module, query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask, **kwargs)[0])
    return torch.cat(parts, 1)


AttentionInterface.register(ATTENTION_NAME, rows_attention)


def attention_function(attention: nn.Module):
    """The function `attention` would call, where kept rows can be handed to it alone; None: it must see every row."""
    code = inspect.unwrap(type(attention).forward).__code__
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names or name not in _INTERCEPTED:
        return None
    if getattr(attention, "reorder_and_upcast_attn", False):
        return None
    if name == "eager":
        return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS[name]


class active:
    """Context: `modules` (module to (selective forward, rows)) compute their rows, and `attention` attends for its own.

    A class rather than a generator: it is entered once a layer and pass.
    """

    def __init__(self, modules: dict[nn.Module, object], rows: dict[nn.Module, Rows], attention: nn.Module, function):
        self.modules, self.rows, self.attention, self.function = modules, rows, attention, function

    def __enter__(self):
        self.outer = _ACTIVE.__dict__.copy()
        self.before = {m: m.__dict__.get("forward") for m in self.modules}
        _ACTIVE.rows, _ACTIVE.attention, _ACTIVE.own = self.rows, self.function, {m: m.forward for m in self.modules}
        for module, forward in self.modules.items():
            module.__dict__["forward"] = forward
        if self.function is not None:
            config = self.attention.config
            self.name, config._attn_implementation_internal = config._attn_implementation_internal, ATTENTION_NAME

    def __exit__(self, *error):
        _ACTIVE.__dict__.clear()
        _ACTIVE.__dict__.update(self.outer)
        for module, forward in self.before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
        if self.function is not None:
            self.attention.config._attn_implementation_internal = self.name
