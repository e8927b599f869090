"""The handle of a routed model: the settings in force, the newest plan, and how hooks come and go.

State of a pass is kept by thread, so that threads may share a model. State of a cache is kept by
the cache.
"""

import contextlib
from threading import get_ident

import torch
from torch import nn

from dlr.routing.compact import compact_layers
from dlr.routing.config import Calibration, RouterConfig
from dlr.routing.decoder import HANDLE, NotRoutable, causal_lm, sublayers
from dlr.routing.device import device_of
from dlr.routing.hooks import Hooks
from dlr.routing.intercept import LOCK, own_forwards
from dlr.routing.masked import BlendLayer, GateSublayer, HideSkippedKeys, argument_names
from dlr.routing.memory import Owner
from dlr.routing.parts import NotCompactable
from dlr.routing.plan import Plan
from dlr.routing.policy import Policy, RouterPolicy
from dlr.routing.router import ROUTER_NAME, Router
from dlr.routing.threads import ThreadState
from dlr.routing.weights import base_record

CHOICES = {"execution": ("masked", "compact"), "decode_plan": ("exact", "consensus", "prompt"),
           "strategy": ("single_pass", "two_pass")}
_UNSET = object()


class _Setting:
    """One value for all threads, in whose place `Routing.at` puts another for one thread."""

    def __set_name__(self, owner, name: str):
        self.name = name

    def __get__(self, routing, owner=None):
        value = routing.threads.changed(self.name, routing.settings[self.name])
        if self.name == "threshold" and value is None:
            return routing.calibration.threshold
        return value

    def __set__(self, routing, value):
        routing.settings[self.name] = routing.checked(self.name, value)
        if self.name == "strategy":
            routing.config.strategy = value             # what a checkpoint says


class Routing:
    """The handle that `attach` returns.

    Attributes:
        policy: the source of gates, None for the dense model.
        execution: 'compact' or 'masked', outside training; training is always masked.
        decode_plan: how a step with a cache is planned, see `policy.RouterPolicy`.
        strategy: 'single_pass' or 'two_pass'.
        threshold: a gate is open where its logit lies above; set to None, it is the calibrated one.
        calibration: what `save_pretrained` writes, whatever `threshold` is in force.
        bf16: whether the model is measured in bfloat16, see `autocast`.
        base: the base model the router was attached to, see `weights.base_record`.
        compact_layers: one `CompactLayer` a routable layer, once compact execution was asked for.
        handles: of hooks that `detach` removes.

    `at` gives the first five other values for the duration of a block, in one thread.
    """
    policy, execution, decode_plan, strategy, threshold = (_Setting() for _ in range(5))

    def __init__(self, model: nn.Module, config: RouterConfig, router: Router, decoder: nn.Module,
                 layers: nn.ModuleList):
        self.model, self.config, self.router = model, config, router
        self.decoder, self.layers = decoder, layers
        self.base = base_record(model)
        self.calibration = Calibration()
        self.settings = {"policy": RouterPolicy(), "execution": "masked", "decode_plan": "exact",
                         "strategy": config.strategy, "threshold": None}
        self.compact_layers: list | None = None
        self.handles: list = []
        self.threads = ThreadState()
        self.owner = Owner()
        self.bf16 = False

    def __setstate__(self, state):
        self.__dict__.update(state | {"owner": Owner()})  # a copy's caches are not the original's

    # -- settings ---------------------------------------------------------------------------------
    def checked(self, name: str, value):
        """`value` if the setting `name` can have it.

        Raises:
            ValueError: it is none of the choices.
            NotRoutable: plans of this router, or on this model, cannot be made or carried out so.
        """
        choices = CHOICES.get(name)
        if choices is None:
            return value
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.")
        if value != choices[0] and not self.router.ahead:
            raise NotRoutable(f"{type(self.router).__name__} decides on each layer from the state "
                              f"before it, so that no plan is known ahead, which {name}={value!r} "
                              f"needs. Use {name}={choices[0]!r}.")
        if value == "compact" and self.config.kv == "drop":
            raise NotRoutable("kv='drop' runs masked only: compact execution keeps every token's "
                              "keys and values. Use execution='masked', or kv='complete'.")
        if value == "compact":
            with LOCK:                               # two threads must not build two sets of them
                try:
                    self.compact_layers = self.compact_layers or compact_layers(self)
                except NotCompactable as error:
                    raise NotRoutable(str(error)) from None
        return value

    @contextlib.contextmanager
    def at(self, *, policy: Policy | None = _UNSET, threshold: float | None = None,
           strategy: str | None = None, execution: str | None = None,
           decode_plan: str | None = None):
        """Other settings for the duration, in this thread alone.

        What is None stays as it is, but for the policy, where None is the dense model.

        Raises:
            ValueError, NotRoutable: as `checked`.
        """
        given = dict(threshold=threshold, strategy=strategy, execution=execution,
                     decode_plan=decode_plan)
        change = {name: self.checked(name, value) for name, value in given.items()
                  if value is not None}
        with self.threads.at(change if policy is _UNSET else change | {"policy": policy}):
            yield self

    def using(self, policy: Policy | None):
        """Another policy for the duration, in this thread alone; None runs the dense model."""
        return self.at(policy=policy)

    def disabled(self):
        """The dense model for the duration, in this thread alone."""
        return self.at(policy=None)

    def autocast(self):
        """The numbers to measure in: bfloat16 where `bf16` is set, else those of the weights."""
        return torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=self.bf16)

    # -- the routable layers ----------------------------------------------------------------------
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

    # -- plans ------------------------------------------------------------------------------------
    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's newest pass; where it has run none, of the newest of all."""
        return self.threads.plan

    @property
    def current(self) -> Plan | None:
        """The routed pass in progress in this thread."""
        return self.threads.passes.get(get_ident())

    def gate(self, unit: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Gate `[b, s, 1]` of one unit in a masked pass; None where there is nothing to blend.

        Args:
            hidden: `[b, s, d]`, what the unit is given; a router that does not plan ahead reads it.
        """
        plan = self.current
        if plan is None or plan.compact or plan.first_pass:
            return None
        if plan.steps is None:
            return self.planned(plan).gates[..., unit:unit + 1]
        if unit == len(plan.steps):
            gate, logit = self.policy.step(self, hidden.to(plan.real.device), unit)
            plan.steps.append((plan.opened(gate, self.config.keep_first_tokens), logit))
        return plan.steps[unit][0]

    def planned(self, plan: Plan) -> Plan:
        """`plan`, whose gates are decided.

        Raises:
            NotRoutable: they are not, so that this pass would run without its router.
        """
        if plan.steps is not None and len(plan.steps) == self.units:
            plan.gates, plan.logits = (torch.cat(column, -1) for column in zip(*plan.steps))
        if plan.gates is None:
            raise NotRoutable(f"Layer {self.first} was not called in this pass, so that no plan "
                              "was made for the layers after it: something drops layers of its own "
                              "(LayerDrop?). Turn that off, or detach the router.")
        return plan

    # -- install, remove --------------------------------------------------------------------------
    def install(self) -> None:
        """Puts the hooks on the model."""
        base = causal_lm(self.model)
        keep, hooks = self.handles.append, Hooks(self)
        keep(base.register_forward_pre_hook(hooks.before_model, with_kwargs=True))
        keep(self.decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True))
        keep(self.decoder.register_forward_hook(hooks.after_decoder, always_call=True))
        first = self.layers[self.first]
        keep(first.register_forward_pre_hook(hooks.before_first_routable, with_kwargs=True))
        for index in range(self.first, self.last):
            unit = (index - self.first) * self.units_per_layer
            layer = self.layers[index]
            if self.config.kv == "drop":
                hook = HideSkippedKeys(self, unit, argument_names(layer))
                keep(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self.config.unit == "layer":
                hook = BlendLayer(self, unit)
                keep(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
            else:
                for offset, part in enumerate(sublayers(layer)):
                    hook = GateSublayer(self, unit + offset)
                    keep(part.register_forward_hook(hook, with_kwargs=True))
        base.add_module(ROUTER_NAME, self.router)
        base.__dict__[HANDLE] = self

    def detach(self) -> nn.Module:
        """Removes every hook and the router: the model is what it was before `attach`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.threads.passes.clear()
        for compact_layer in self.compact_layers or ():
            compact_layer.remove()
        for layer in self.layers:
            own_forwards(layer.modules())
        base = causal_lm(self.model)
        if hasattr(base, ROUTER_NAME):
            delattr(base, ROUTER_NAME)
        base.__dict__.pop(HANDLE, None)
        return self.model
