"""Standing in for a module's forward or its attention function, for one thread and one block.

Nothing stays on the model: what was put there goes away when the block ends, also on an interrupt,
and other threads that run the same modules meanwhile get the modules' own code.
"""

import functools
import inspect
import sys
import threading
from threading import get_ident
from typing import ClassVar

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from dlr.routing.families import ANY_MASK, FLASH, FLEX, PLACE_FINDERS

ATTENTION_NAME = "dlr_rows"  # what attention modules find as their attention function meanwhile
# held while stand-ins are put in place or taken away, never while they run
LOCK = threading.RLock()


class InPlace:
    """An object that stands in the place of a module's forward while it is installed."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before = None  # a forward of the module's own __dict__ (accelerate's)

    def install(self) -> None:
        """Puts this in the forward's place until `remove`; a second time changes nothing."""
        forward = self.module.__dict__.get("forward")
        if forward is not self:
            self.before = forward
            self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Gives the module its own forward back."""
        if self.module.__dict__.get("forward") is not self:
            return
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before

    def own(self, *args, **kwargs):
        """The module's own forward."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class Standin(InPlace):
    """A module's forward, in whose place each thread may have put another function.

    Two at once: `own_by_thread` is what a thread takes for the module's own forward (merged
    weights), and `by_thread` what it puts above that (kept rows).
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.by_thread: dict = {}
        self.own_by_thread: dict = {}

    def __call__(self, *args, **kwargs):
        forward = self.by_thread.get(get_ident(), self.own)
        return forward(*args, **kwargs)

    def own(self, *args, **kwargs):
        forward = self.own_by_thread.get(get_ident(), super().own)
        return forward(*args, **kwargs)

    def __getstate__(self):                               # a copy of the model is in nobody's block
        return self.__dict__ | {"by_thread": {}, "own_by_thread": {}}

    @staticmethod
    def of(module: nn.Module) -> "Standin | None":
        """The stand-in now in place of the module's forward, if any."""
        forward = module.__dict__.get("forward")
        return forward if isinstance(forward, Standin) else None

    @classmethod
    def put(cls, module: nn.Module, forward, as_own: bool = False) -> None:
        """Lets `forward` stand in for the module's in this thread, `as_own` below all others."""
        with LOCK:
            standin = cls.of(module)
            if standin is None:
                standin = cls(module)
                standin.install()
            (standin.own_by_thread if as_own else standin.by_thread)[get_ident()] = forward

    @classmethod
    def take(cls, module: nn.Module, everybody: bool = False, as_own: bool = False) -> None:
        """Takes this thread's function away, or everybody's; the last leaves the module's own."""
        with LOCK:
            standin = cls.of(module)
            if standin is None:
                return
            if everybody:
                standin.by_thread.clear()
                standin.own_by_thread.clear()
            (standin.own_by_thread if as_own else standin.by_thread).pop(get_ident(), None)
            if not standin.by_thread and not standin.own_by_thread:
                standin.remove()


class _Config:
    """An attention's configuration, which names ATTENTION_NAME to threads that exchange it."""

    def __init__(self, config):
        self.__dict__.update(real=config, by_thread={})

    def __getattr__(self, name):
        if name in ("real", "by_thread"):  # asked before they are set, while a copy is being made
            raise AttributeError(name)
        if name == "_attn_implementation" and get_ident() in self.by_thread:
            return ATTENTION_NAME
        return getattr(self.real, name)

    def __setattr__(self, name, value):
        setattr(self.real, name, value)

    def __getstate__(self):
        return {"real": self.real, "by_thread": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @classmethod
    def put(cls, attention: nn.Module, attend) -> None:
        with LOCK:
            if not isinstance(attention.config, cls):
                attention.__dict__["config"] = cls(attention.config)
            attention.config.by_thread[get_ident()] = attend

    @classmethod
    def take(cls, attention: nn.Module, everybody: bool = False) -> None:
        with LOCK:
            config = getattr(attention, "config", None)
            if not isinstance(config, cls):
                return
            config.by_thread.clear() if everybody else config.by_thread.pop(get_ident(), None)
            if not config.by_thread:
                attention.__dict__["config"] = config.real


def _attention(module, query, key, value, attention_mask, **kwargs):
    return module.config.by_thread[get_ident()](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)


@functools.lru_cache
def _exchangeable(family: type) -> bool:
    """Whether a family's attention calls one function once, and finds no places by itself."""
    forward = inspect.unwrap(family.forward)
    names = forward.__code__.co_names
    try:
        calls = inspect.getsource(forward).count("attention_interface(")
    except OSError:                                            # installed without sources
        return False
    by_place = set(PLACE_FINDERS).intersection(names)
    return calls == 1 and "ALL_ATTENTION_FUNCTIONS" in names and not by_place


def attention_function(attention: nn.Module):
    """The function `attention` would call, if it can be given kept rows alone; else None."""
    config = getattr(attention, "config", None)
    name = getattr(getattr(config, "real", config), "_attn_implementation", None)
    if name not in (*ANY_MASK, *FLASH, FLEX) or not _exchangeable(type(attention)):
        return None
    if getattr(attention, "reorder_and_upcast_attn", False):
        return None
    # kept rows are given to SDPA in place of these, and it has neither soft caps nor sinks
    own_terms = getattr(attention, "sinks", None), getattr(config, "attn_logit_softcapping", None)
    if name in FLASH and own_terms != (None, None):
        return None
    if name == "eager":
        return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS[name]


class intercepted:
    """Context: modules run `forwards`, and `attention` calls `attend` (None: its own function).

    A class rather than a generator: it is entered once or twice a layer and pass.

    Attributes:
        begun: (thread, attention) to attention's stand-in, of blocks that have not ended; an
            interrupt leaves some behind.
    """
    begun: ClassVar[dict] = {}

    def __init__(self, forwards: dict, attention: nn.Module, attend):
        self.forwards, self.attention, self.attend = forwards, attention, attend

    def __enter__(self):
        self.begun[get_ident(), self.attention] = self.attend
        try:
            for module, forward in self.forwards.items():
                Standin.put(module, forward)
            if self.attend is not None:
                _Config.put(self.attention, self.attend)
        except BaseException:                              # an interrupt before the block has begun
            self.__exit__()
            raise

    def __exit__(self, *error):
        for module in self.forwards:
            Standin.take(module)
        if self.attend is not None:
            _Config.take(self.attention)
        self.begun.pop((get_ident(), self.attention), None)


def own_forwards(modules, everybody: bool = True) -> None:
    """Gives modules their own forward and configuration back, of this thread or of everybody."""
    for module in modules:
        if isinstance(module.__dict__.get("forward"), Standin):
            Standin.take(module, everybody)
        if isinstance(module.__dict__.get("config"), _Config):
            _Config.take(module, everybody)
