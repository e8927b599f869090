"""Other forwards in some modules of a layer, and another attention function, for the duration of a call."""

import functools
import inspect
import sys
import threading

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

ATTENTION_NAME = "dlr_rows"        # what attention modules find as their attention function meanwhile
_INTERCEPTED = ("sdpa", "eager")   # attention functions that take any mask; others see every query row
_BY_PLACE = frozenset({"arange", "get_seq_length", "get_query_offset"})      # how attention code finds places by itself
_ACTIVE = threading.local()


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _ACTIVE.attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)


@functools.lru_cache
def _exchangeable(family: type) -> bool:
    """Whether a family's attention calls one attention function once, and asks for places neither itself nor its cache."""
    forward = inspect.unwrap(family.forward)
    names = forward.__code__.co_names
    try:
        calls = inspect.getsource(forward).count("attention_interface(")
    except OSError:                                            # installed without sources
        return False
    return calls == 1 and "ALL_ATTENTION_FUNCTIONS" in names and not _BY_PLACE.intersection(names)


def attention_function(attention: nn.Module):
    """The function `attention` would call, where kept rows can be handed to it alone; None: it must see every row."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if name not in _INTERCEPTED or not _exchangeable(type(attention)):
        return None
    if getattr(attention, "reorder_and_upcast_attn", False):
        return None
    if name == "eager":
        return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS[name]


class intercepted:
    """Context: the modules of `forwards` run those instead of their own, and `attention` calls `attend` (None: its own).

    A class rather than a generator: it is entered once or twice a layer and pass.
    """

    def __init__(self, forwards: dict, attention: nn.Module, attend):
        self.forwards, self.attention, self.attend = forwards, attention, attend

    def __enter__(self):
        self.before = {module: module.__dict__.get("forward") for module in self.forwards}
        for module, forward in self.forwards.items():
            module.__dict__["forward"] = forward
        if self.attend is not None:
            self.outer, _ACTIVE.attend = getattr(_ACTIVE, "attend", None), self.attend
            config = self.attention.config
            self.name, config._attn_implementation_internal = config._attn_implementation_internal, ATTENTION_NAME

    def __exit__(self, *error):
        for module, forward in self.before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
        if self.attend is not None:
            _ACTIVE.attend = self.outer
            self.attention.config._attn_implementation_internal = self.name
