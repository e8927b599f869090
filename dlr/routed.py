"""Attach a router to a Hugging Face causal LM by hooks, detach it, save and load it.

No layer is wrapped and no parameter renamed. A hook before the decoder notes padding and positions, a hook before
layer K makes the plan, and a hook on each routable layer blends its output with its input (see `execution`).
"""

import contextlib
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from dlr.compact import ATTENTION, MLP, CompactLayer, NotCompactable, compact_layers
from dlr.config import RouterConfig
from dlr.execution import blend_layer, gate_sublayer, hide_skipped_keys, needs_first_pass, run_first_pass
from dlr.identity import NANO_NAME, base_record, describe_base  # noqa: F401
from dlr.packed import keep_differentiable
from dlr.plan import Plan
from dlr.policy import Policy, RouterPolicy
from dlr.router import ROUTER_NAME, Router
from dlr.rows import plan_rows

EXECUTIONS, DECODE_PLANS = ("masked", "compact"), ("exact", "consensus", "prompt")
_HANDLE = "_dlr_routing"          # entry in the base model's __dict__
_CACHE_OWNERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()        # cache to the routing that began it


class NotRoutable(ValueError):
    """The model cannot be routed as asked; the message says why and what to do."""


@dataclass
class Pass:
    """What the hooks know about the forward pass in progress."""
    real: torch.Tensor                      # [b, s] bool, False at padding
    position: torch.Tensor                  # [b, s] place among the real tokens of the row, from 0
    cache: object = None
    gates: torch.Tensor | None = None       # [b, s, U]
    logits: torch.Tensor | None = None
    first_pass: bool = False
    memory: torch.Tensor | None = None      # what later passes over the same cache are to know (see `Routing.remembered`)
    compact: bool = False
    keep: torch.Tensor | None = None        # [b, s, U] bool, in a compact pass: gates of real tokens
    rows: list | None = None                # in a compact pass: `rows.Rows` a unit, None where all run it


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside `model` (which may be a PEFT model)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_and_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers, and those layers.

    Raises:
        NotRoutable: `model` is no decoder-only language model.
    """
    base = causal_lm(model)
    config = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not (
            hasattr(base, "can_generate") and base.can_generate()) or count is None:
        raise NotRoutable(f"{type(base).__name__} is no decoder-only language model; DLR routes the layers of causal "
                          "LMs such as LlamaForCausalLM.")
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise NotRoutable(f"{type(base).__name__} holds no list of {count} decoder layers.")


def _sublayers(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    found = [next((getattr(layer, n) for n in names if hasattr(layer, n)), None) for names in (ATTENTION, MLP)]
    if None in found or "residual" in found[0].forward.__code__.co_varnames:
        raise NotRoutable(f"unit='sublayer' needs layers with separate attention and MLP modules that leave the "
                          f"residual alone; {type(layer).__name__} has none. Use unit='layer'.")
    return found[0], found[1]


@dataclass(eq=False)
class Routing:
    """The handle `attach` returns: the router, the policy in force, and the plan of the newest forward pass."""
    model: nn.Module
    config: RouterConfig
    router: Router
    decoder: nn.Module
    layers: nn.ModuleList
    policy: Policy
    plan: Plan | None = None
    execution: str = "masked"            # outside training; training is always masked
    decode_plan: str = "exact"           # how a step with a cache is planned, see `policy.RouterPolicy`
    _memory: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)
    _compact: list[CompactLayer] | None = None
    _pass: Pass | None = None
    _handles: list = field(default_factory=list)

    def __setattr__(self, name, value):
        if name == "execution":
            self._set_execution(value)
        elif name == "decode_plan" and value not in DECODE_PLANS:
            raise ValueError(f"decode_plan={value!r} is not one of {', '.join(DECODE_PLANS)}.")
        super().__setattr__(name, value)

    def _set_execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f"execution={value!r} is not one of {', '.join(EXECUTIONS)}.")
        if value == "compact" and self.config.kv == "drop":
            raise NotRoutable("kv='drop' runs masked only: compact execution keeps every token's keys and values. Use "
                              "execution='masked', or kv='complete'.")
        if value == "compact" and getattr(self, "_compact", None) is None:
            try:
                self._compact = compact_layers(self)
            except NotCompactable as error:
                raise NotRoutable(str(error)) from None

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

    @contextlib.contextmanager
    def using(self, policy: Policy | None):
        """Another policy for the duration; None runs the dense model."""
        before, self.policy = self.policy, policy
        try:
            yield self
        finally:
            self.policy = before

    def disabled(self):
        """The dense model for the duration."""
        return self.using(None)

    def detach(self) -> nn.Module:
        """Removes every hook and the router; the model is what it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        base = causal_lm(self.model)
        if hasattr(base, ROUTER_NAME):
            delattr(base, ROUTER_NAME)
        base.__dict__.pop(_HANDLE, None)
        return self.model

    # -- hooks ------------------------------------------------------------------------------------------------------
    def _runs_compact(self) -> bool:
        training = torch.is_grad_enabled() or self.decoder.training or getattr(self.policy, "training", False)
        return self.execution == "compact" and not training

    def _before_decoder(self, module, args, kwargs):
        if self.policy is None or (self._pass is not None and self._pass.first_pass):
            return
        self._pass = current = _new_pass(args, kwargs)
        if self.config.kv == "drop" and current.cache is not None:
            raise ValueError("kv='drop' has no cached form, since skipped tokens would be missing from some layers' caches: "
                             "pass use_cache=False, or use kv='complete'.")
        self._own_cache(current.cache)
        self.policy.check(self, *current.real.shape)
        if self._runs_compact():
            current.compact = True
            for layer in self._compact:
                layer.install()
        if needs_first_pass(self):
            run_first_pass(self, module, args, kwargs)

    def _own_cache(self, cache) -> None:
        """Refuses a cache that another router's plans have filled."""
        if cache is not None and _CACHE_OWNERS.setdefault(cache, self) is not self:
            raise ValueError("This key/value cache was begun by another router, whose plan decided what is in it; go on "
                             "with that router, or start again with an empty cache.")

    def _before_first_routable(self, module, args, kwargs):
        current = self._pass
        if self.policy is None or current is None or current.gates is not None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        gates, current.logits = self.policy(self, hidden, current)
        keep = current.position < self.config.keep_first_tokens
        current.gates = torch.where(keep.unsqueeze(-1), torch.ones_like(gates), gates)
        if current.compact:
            current.keep = (current.gates > 0.5) & current.real.unsqueeze(-1)
            current.rows = plan_rows(current.gates, current.real)
        self.plan = Plan(current.gates, current.logits, current.real, self.first + self.config.keep_last,
                         self.units_per_layer)

    def _after_decoder(self, module, args, output):
        current = self._pass
        if current is None or current.first_pass:
            return
        self._pass = None
        if current.compact:
            for layer in self._compact:
                layer.remove()
        cache = current.cache if current.cache is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            self._own_cache(cache)
            if current.memory is not None:
                self._memory[cache] = current.memory

    def remembered(self, cache) -> torch.Tensor | None:
        """What an earlier pass over `cache` decided for the passes that go on from it."""
        return None if cache is None else self._memory.get(cache)

    def gate(self, unit: int) -> torch.Tensor | None:
        """Gate `[b, s, 1]` of one unit in the masked pass in progress, or None where there is nothing to blend."""
        if self.policy is None or self._pass is None or self._pass.gates is None or self._pass.compact:
            return None
        return self._pass.gates[..., unit:unit + 1]

    def _install(self) -> None:
        keep = self._handles.append
        keep(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        keep(self.decoder.register_forward_hook(self._after_decoder, always_call=True))
        keep(self.layers[self.first].register_forward_pre_hook(self._before_first_routable, with_kwargs=True))
        for index in range(self.first, self.last):
            if self.config.kv == "drop":
                hook = hide_skipped_keys(self, (index - self.first) * self.units_per_layer, self.layers[index])
                keep(self.layers[index].register_forward_pre_hook(hook, with_kwargs=True))
            if self.config.unit == "layer":
                hook = blend_layer(self, index - self.first)
                keep(self.layers[index].register_forward_hook(hook, with_kwargs=True, prepend=True))
            else:
                for offset, part in enumerate(_sublayers(self.layers[index])):
                    keep(part.register_forward_hook(gate_sublayer(self, 2 * (index - self.first) + offset)))


def _new_pass(args, kwargs) -> Pass:
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs.get("inputs_embeds")
    batch, length = (ids.shape if ids is not None else embeds.shape[:2])
    device = (ids if ids is not None else embeds).device
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0        # a tensor in static caches: not brought to the host
    place = torch.arange(length, device=device) + past
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        place = place.clamp(max=mask.shape[1] - 1)
        return Pass(mask[:, place].bool(), mask.long().cumsum(1)[:, place] - 1, cache)
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    return Pass(real, place.expand(batch, length), cache)


def attach(model: nn.Module, config: RouterConfig | None = None, execution: str | None = None) -> Routing:
    """Adds a fresh router to a causal LM (or a PEFT model around one) and returns its handle.

    Args:
        execution: how plans are carried out outside training. 'compact' computes only what they keep, 'masked' computes
            everything and blends; same results. None: compact where the model's layers allow it.

    Raises:
        NotRoutable: no decoder-only LM, no layer left to route, a router is attached already, or execution='compact'
            was asked for and cannot be exact; the message says why.
    """
    config = config or RouterConfig()
    base = causal_lm(model)
    decoder, layers = decoder_and_layers(model)
    if _HANDLE in base.__dict__:
        raise NotRoutable(f"This {type(base).__name__} already has a router; call routing_of(model).detach() first.")
    if config.always_keep + config.keep_last >= len(layers):
        raise NotRoutable(f"always_keep={config.always_keep} and keep_last={config.keep_last} leave none of the model's "
                          f"{len(layers)} layers to route; together they must be below {len(layers)}.")
    if config.kv == "drop" and base.config.get_text_config()._attn_implementation not in ("sdpa", "eager"):
        raise NotRoutable("kv='drop' needs an attention that takes any mask; load the model with attn_implementation='sdpa' "
                          "or 'eager'.")
    per_layer = 2 if config.unit == "sublayer" else 1
    keep_differentiable(base)
    units = (len(layers) - config.always_keep - config.keep_last) * per_layer
    router = Router(base.config.get_text_config().hidden_size, units, config)
    router.to(next(layers[config.always_keep].parameters()).device)
    routing = Routing(model, config.model_copy(update={"base": base_record(model)}), router, decoder, layers,
                      RouterPolicy())
    try:
        routing.execution = execution or "compact"
    except NotRoutable:
        if execution is not None:
            raise
    routing._install()
    base.add_module(ROUTER_NAME, router)
    base.__dict__[_HANDLE] = routing
    return routing


def routing_of(model: nn.Module) -> Routing:
    """The handle of a model that has a router; raises NotRoutable where it has none."""
    try:
        return causal_lm(model).__dict__[_HANDLE]
    except KeyError:
        raise NotRoutable(f"No router is attached to this {type(causal_lm(model)).__name__}; call dlr.attach(model).") \
            from None
