"""What a key/value cache remembers of the router that filled it.

The memory is an attribute of the cache, so that copies of the cache have it too. Where it holds a
row a sequence, it follows the cache through everything that moves rows.
"""

import functools
from dataclasses import dataclass

import torch

_ATTRIBUTE = "_dlr_memory"


class Owner:
    """Names the routing that began a cache; a copy of the cache names the same one."""

    def __deepcopy__(self, memo):
        return self


@dataclass
class Memory:
    """Attributes:
        owner: the routing that began the cache.
        seen: tokens it has been given.
        prompt: `[U]` gates fixed at prefill (decode_plan='prompt'), or None.
        pool: `[b, P + 1, d]` states before layer K by place (level='sequence'; the last place is
            for the others), or None.
    """
    owner: Owner
    seen: int | torch.Tensor = 0
    prompt: torch.Tensor | None = None
    pool: torch.Tensor | None = None


class _Following:
    """Of a cache whose memory follows what happens to it."""

    def reset(self):
        super().reset()
        remember(self, None)

    def _rows(self, change) -> None:
        """Lets `change`, a function of `[b, ...]`, act on what the memory holds by row."""
        memory = memory_of(self)
        if memory is not None and memory.pool is not None:
            memory.pool = change(memory.pool)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._rows(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def __reduce_ex__(self, protocol):
        return _again, (type(self).__mro__[2],), self.__dict__


@functools.lru_cache
def _following(kind: type) -> type:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Following, kind), names)


def _again(kind: type):
    """An empty shell of a cache, for its copy."""
    return object.__new__(_following(kind))


def memory_of(cache) -> Memory | None:
    """The memory of a cache, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def remember(cache, memory: Memory | None) -> None:
    """Gives `cache` its memory; None takes it away."""
    setattr(cache, _ATTRIBUTE, memory)
    if not isinstance(cache, _Following):
        cache.__class__ = _following(type(cache))
