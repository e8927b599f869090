"""The handle of a routed model: its hooks, what they do in a forward pass, and how they are removed.

No layer is wrapped and no parameter renamed. A hook before the decoder notes padding and positions, a hook before
layer K makes the plan, and a hook on each routable layer blends its output with its input (see `execution`).

What a pass is about is kept by thread, so that threads may share a model; what a cache is about is kept by the cache.
"""

import contextlib
import dataclasses
import warnings
from threading import get_ident

import torch
from torch import nn

from dlr.compact import NotCompactable, compact_layers
from dlr.decoder import NotRoutable, causal_lm, refuse_layerdrop, sublayers
from dlr.execution import BlendLayer, FirstPassDone, GateSublayer, HideSkippedKeys, argument_names, run_first_pass
from dlr.families import CACHES
from dlr.intercept import LOCK, own_forwards
from dlr.memory import Memory, Owner, memory_of, remember
from dlr.passes import Pass, asked_of_model, pass_of, records_more
from dlr.plan import Plan
from dlr.policy import Policy, RouterPolicy
from dlr.router import ROUTER_NAME, Router
from dlr.router_config import Calibration, RouterConfig
from dlr.rows import plan_rows
from dlr.threads import ThreadState
from dlr.weights import base_record

CHOICES = {"execution": ("masked", "compact"), "decode_plan": ("exact", "consensus", "prompt"),
           "strategy": ("single_pass", "two_pass")}
HANDLE = "_dlr_routing"           # entry in the base model's __dict__
_UNSET = object()


class _Setting:
    """A setting of a `Routing`: one value for all threads, in whose place `Routing.at` puts another for one thread."""

    def __set_name__(self, owner, name: str):
        self.name = name

    def __get__(self, routing, owner=None):
        value = routing._threads.changed(self.name, routing.settings[self.name])
        return routing.calibration.threshold if self.name == "threshold" and value is None else value

    def __set__(self, routing, value):
        routing.settings[self.name] = routing.checked(self.name, value)


class RunsMasked(UserWarning):
    """Plans are carried out masked, with the same results and no time saved, although nobody asked for that."""


class Routing:
    """The handle `attach` returns: the router, the policy in force, and the plan of the newest forward pass.

    Attributes:
        execution: 'compact' or 'masked', outside training; training is always masked.
        decode_plan: how a step with a cache is planned, see `policy.RouterPolicy`.
        policy: the source of gates, None for the dense model.
        strategy: 'single_pass' or 'two_pass'.
        threshold: a gate is open where its logit lies above; set to None, it is the calibrated one.
        calibration: what `save_pretrained` writes of the router's budget, whatever `threshold` is in force.
        base: the base model the router was attached to, see `weights.base_record`.
        handles: of hooks that `detach` removes.

    `at` gives the five settings other values for the duration of a block, in one thread.
    """
    policy, execution, decode_plan, strategy, threshold = (_Setting() for _ in range(5))

    def __init__(self, model: nn.Module, config: RouterConfig, router: Router, decoder: nn.Module, layers: nn.ModuleList):
        self.model, self.config, self.router, self.decoder, self.layers = model, config, router, decoder, layers
        self.base, self.calibration = base_record(model), Calibration()
        self.settings = {"policy": RouterPolicy(), "execution": "masked", "decode_plan": "exact",
                         "strategy": config.strategy, "threshold": None}
        self._compact: list | None = None
        self.handles: list = []
        self._said: set[str] = set()
        self._threads, self.owner = ThreadState(), Owner()

    def __setstate__(self, state):
        self.__dict__.update(state | {"owner": Owner()})          # a copy's caches are not the original's

    # -- settings ---------------------------------------------------------------------------------------------------
    def checked(self, name: str, value):
        """`value` if the setting `name` can have it.

        Raises:
            ValueError: it is none of the choices. NotRoutable: plans of this model cannot run compacted.
        """
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(CHOICES[name])}.")
        if value == "compact" and self.config.kv == "drop":
            raise NotRoutable("kv='drop' runs masked only: compact execution keeps every token's keys and values. Use "
                              "execution='masked', or kv='complete'.")
        if value == "compact" and self._compact is None:
            try:
                self._compact = compact_layers(self)
            except NotCompactable as error:
                raise NotRoutable(str(error)) from None
        return value

    @contextlib.contextmanager
    def at(self, *, policy: Policy | None = _UNSET, threshold: float | None = None, strategy: str | None = None,
           execution: str | None = None, decode_plan: str | None = None):
        """Other settings for the duration, in this thread alone. What is None stays, but for the policy, where None is
        the dense model.

        Raises:
            ValueError, NotRoutable: as `checked`.
        """
        given = {"threshold": threshold, "strategy": strategy, "execution": execution, "decode_plan": decode_plan}
        change = {name: self.checked(name, value) for name, value in given.items() if value is not None}
        with self._threads.at(change if policy is _UNSET else change | {"policy": policy}):
            yield self

    def using(self, policy: Policy | None):
        """Another policy for the duration, in this thread alone; None runs the dense model."""
        return self.at(policy=policy)

    def disabled(self):
        """The dense model for the duration, in this thread alone."""
        return self.at(policy=None)

    # -- what there is ----------------------------------------------------------------------------------------------
    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's newest pass; in a thread that has run none, of the newest of all."""
        return self._threads.plan

    @property
    def first(self) -> int:
        """Index of the first routable layer (K)."""
        return self.config.always_keep

    @property
    def last(self) -> int:
        """Index after the last routable layer."""
        return len(self.layers) - self.config.keep_last

    @property
    def units_per_layer(self) -> int:
        return 2 if self.config.unit == "sublayer" else 1

    @property
    def units(self) -> int:
        return (self.last - self.first) * self.units_per_layer

    @property
    def current(self) -> Pass | None:
        """The routed pass in progress in this thread."""
        return self._threads.passes.get(get_ident())

    def gate(self, unit: int) -> torch.Tensor | None:
        """Gate `[b, s, 1]` of one unit in the masked pass in progress, or None where there is nothing to blend."""
        current = self.current
        if current is None or current.compact or current.first_pass:
            return None
        return self.planned(current).gates[..., unit:unit + 1]

    def planned(self, current: Pass) -> Pass:
        """`current`, whose plan is made.

        Raises:
            NotRoutable: it is not, so that this pass would run without its router.
        """
        if current.gates is None:
            raise NotRoutable(f"Layer {self.first} was not called in this pass, so that no plan was made for the layers after "
                              "it: something drops layers of its own (LayerDrop?). Turn that off, or detach the router.")
        return current

    # -- install, remove --------------------------------------------------------------------------------------------
    def install(self) -> None:
        """Puts the hooks on the model."""
        keep, base = self.handles.append, causal_lm(self.model)
        keep(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        keep(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        keep(self.decoder.register_forward_hook(self._after_decoder, always_call=True))
        keep(self.layers[self.first].register_forward_pre_hook(self._before_first_routable, with_kwargs=True))
        for index in range(self.first, self.last):
            unit, layer = (index - self.first) * self.units_per_layer, self.layers[index]
            if self.config.kv == "drop":
                hook = HideSkippedKeys(self, unit, argument_names(layer))
                keep(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self.config.unit == "layer":
                keep(layer.register_forward_hook(BlendLayer(self, unit), with_kwargs=True, prepend=True))
            else:
                for offset, part in enumerate(sublayers(layer)):
                    keep(part.register_forward_hook(GateSublayer(self, unit + offset)))
        base.add_module(ROUTER_NAME, self.router)
        base.__dict__[HANDLE] = self

    def detach(self) -> nn.Module:
        """Removes every hook and the router; the model is what it was before `attach`, whatever happened in between."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._threads.passes.clear()
        self._stand_aside()
        base = causal_lm(self.model)
        if hasattr(base, ROUTER_NAME):
            delattr(base, ROUTER_NAME)
        base.__dict__.pop(HANDLE, None)
        return self.model

    def _stand_aside(self) -> None:
        """Gives layers and their modules their own code back."""
        for layer in self._compact or ():
            layer.remove()
        for layer in self.layers:
            own_forwards(layer.modules())

    # -- hooks ------------------------------------------------------------------------------------------------------
    def _before_model(self, module, args, kwargs):
        self._threads.asked[get_ident()] = asked_of_model(kwargs)

    def _before_decoder(self, module, args, kwargs):
        current = self.current
        if current is not None and current.first_pass:
            return
        if module is not self.decoder:
            raise NotRoutable("This is a replica of the routed model (torch.nn.DataParallel?), which shares its hooks; use one "
                              "process a device (torchrun, accelerate launch).")
        self._end_pass()                                   # what an interrupted pass of this thread left behind
        for layer in self._compact or ():
            layer.tidy()
        asked = self._threads.asked.pop(get_ident(), {})
        if self.policy is None:
            return
        current = pass_of(args, kwargs, asked)
        self._check(current, kwargs)
        current.compact = self._runs_compact(records_more(module, kwargs))
        self._begin_pass(current)
        if self.strategy == "two_pass" and self.policy.reads_hidden:
            run_first_pass(current, module, args, kwargs)

    def _check(self, current: Pass, kwargs: dict) -> None:
        """Refuses what cannot be honoured, before anything is computed."""
        if self.config.kv == "drop" and current.cache is not None:
            raise ValueError("kv='drop' has no cached form, since skipped tokens would be missing from some layers' caches: "
                             "pass use_cache=False, or use kv='complete'.")
        if self.decoder.training:
            refuse_layerdrop(self.decoder)
            if self.units_per_layer == 2 and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
                raise NotRoutable("unit='sublayer' cannot be trained with gradient checkpointing, which computes attention and "
                                  "MLP again when their gates are gone. Turn it off, or use unit='layer'.")
        if any(parameter.is_meta for parameter in self.router.parameters()):
            raise NotRoutable("The router's weights were offloaded with the base model's; they are few, and are needed before "
                              "the first skipped layer. Detach, offload the base, and attach again.")
        current.memory = self._memory_of(current)
        self.policy.check(self, current)

    def _memory_of(self, current: Pass) -> Memory | None:
        """What the pass's cache remembers; refuses a cache that another router's plans have filled."""
        if current.cache is None:
            return Memory(self.owner, current.seen)
        memory = memory_of(current.cache) if current.past is not False else None
        if memory is not None and memory.owner is not self.owner:
            raise ValueError("This key/value cache was begun by another router, whose plan decided what is in it; go on "
                             "with that router, or start again with an empty cache.")
        return Memory(self.owner, current.seen) if memory is None else dataclasses.replace(memory, seen=current.seen)

    def _runs_compact(self, records: bool) -> bool:
        """Whether this pass is compacted; where it could be but for what the caller asked, that is said once."""
        if self.execution != "compact" or self.decoder.training or getattr(self.policy, "training", False):
            return False
        if records:
            self._say("attention maps (or another record of what layers compute inside) were asked for, which every layer "
                      "must run for")
            return False
        if torch.is_grad_enabled():
            self._say("gradients are being recorded; use torch.no_grad() or torch.inference_mode()")
            return False
        try:
            for layer in self._compact:
                layer.refresh()
        except NotCompactable as error:                        # an adapter has been put in a place that mixes rows
            self._say(str(error).removesuffix("."))
            return False
        return True

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"Plans run masked, with the same results and no time saved: {why}.", RunsMasked, stacklevel=2)

    def _begin_pass(self, current: Pass) -> None:
        with LOCK:
            self._threads.forget_the_dead()
            self._threads.passes[get_ident()] = current
            if current.compact:
                for layer in self._compact:
                    layer.install()

    def _end_pass(self) -> None:
        """Ends this thread's pass, and takes compact layers away with the last one that uses them."""
        with LOCK:
            if not any(current.compact for thread, current in self._threads.passes.items() if thread != get_ident()):
                for layer in self._compact or ():
                    layer.remove()
            self._threads.passes.pop(get_ident(), None)

    def _before_first_routable(self, module, args, kwargs):
        current = self.current
        if current is None or current.gates is not None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape != (*current.real.shape, self.router.width):
            raise NotRoutable(f"{type(module).__name__} is given states {tuple(hidden.shape)}, where DLR routes one state "
                              f"a token, {(*current.real.shape, self.router.width)}: this family carries several, or in "
                              "another order. Detach the router.")
        current.real, current.position = current.real.to(hidden.device), current.position.to(hidden.device)
        gates, current.logits = self.policy(self, hidden, current)
        keep = current.position < self.config.keep_first_tokens
        current.gates = torch.where(keep.unsqueeze(-1), torch.ones_like(gates), gates)
        if current.compact:
            current.keep = (current.gates > 0.5) & current.real.unsqueeze(-1)
            current.rows = plan_rows(current.gates, current.real)
        self._threads.plan = Plan(current.gates, current.logits, current.real, self.first + self.config.keep_last,
                                  self.units_per_layer)
        if current.first_pass:
            raise FirstPassDone

    def _after_decoder(self, module, args, output):
        current = self.current
        if current is None or current.first_pass:
            return
        self._end_pass()
        cache = current.cache if current.cache is not None else _cache_in(output)
        if cache is not None and current.gates is not None:
            remember(cache, current.memory)


def _cache_in(output):
    """The cache a decoder made itself, in its output; None where there is none, or the pass ended in an error."""
    values = output if isinstance(output, tuple) else [getattr(output, name, None) for name in CACHES]
    return next((value for value in values if hasattr(value, "get_seq_length")), None)
