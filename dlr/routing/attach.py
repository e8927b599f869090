"""Attach a router to a Hugging Face causal LM, and find it again."""

import warnings

import torch
import torch._dynamo
from torch import nn

from dlr.routing.config import RouterConfig
from dlr.routing.decoder import HANDLE, NotRoutable, causal_lm, decoder_and_layers, refuse_layerdrop
from dlr.routing.device import execution_device
from dlr.routing.families import ANY_MASK
from dlr.routing.handle import Routing
from dlr.routing.hooks import RunsMasked
from dlr.routing.packed import keep_differentiable
from dlr.routing.router import router_class


def attach(model: nn.Module, config: RouterConfig | None = None,
           execution: str | None = None, bf16: bool = False) -> Routing:
    """Adds a fresh router to a causal LM (or a PEFT model around one) and returns its handle.

    Args:
        execution: how plans are carried out outside training. 'compact' computes only what they
            keep, 'masked' computes everything and blends; same results. None: compact where the
            model's layers allow it; where they do not, a `RunsMasked` warning says why.
        bf16: whether the model is measured in bfloat16, see `Routing.autocast`.

    Raises:
        NotRoutable: no decoder-only LM, no layer left to route, a router is attached already, or
            execution='compact' was asked for and cannot be exact; the message says why, and the
            model is as it was.
    """
    config = config or RouterConfig()
    base = causal_lm(model)
    decoder, layers = decoder_and_layers(model)
    _refuse_unroutable(base, config, decoder, layers)
    _compile_with_hooks()
    per_layer = 2 if config.unit == "sublayer" else 1
    keep_differentiable(base)
    units = (len(layers) - config.always_keep - config.keep_last) * per_layer
    kind = router_class(config.router_class)
    if not kind.ahead:
        _refuse_unplannable(kind.__name__, config)
    router = kind(base.config.get_text_config().hidden_size, units, config)
    router.to(execution_device(layers[config.always_keep]))
    routing = Routing(model, config.model_copy(), router, decoder, layers)
    routing.bf16 = bf16
    try:
        routing.execution = execution or "compact"
    except NotRoutable as error:
        if execution is not None:
            raise
        warnings.warn(f"Plans run masked, with the same results and no time saved: {error}",
                      RunsMasked, stacklevel=2)
    try:
        routing.install()
    except BaseException:
        routing.detach()
        raise
    return routing


def _refuse_unplannable(name: str, config: RouterConfig) -> None:
    """Refuses settings that need a plan before layer K, of a router that decides layer by layer."""
    for setting, value in (("level", "token"), ("strategy", "single_pass")):
        if getattr(config, setting) != value:
            raise NotRoutable(f"{name} decides on each layer from the state before it, so that no "
                              f"plan is known ahead, which {setting}={getattr(config, setting)!r} "
                              f"needs. Use {setting}={value!r}.")


def _refuse_unroutable(base, config: RouterConfig, decoder, layers) -> None:
    """Raises NotRoutable where this model cannot be routed under these settings."""
    if HANDLE in base.__dict__:
        raise NotRoutable(f"This {type(base).__name__} already has a router; call "
                          "routing_of(model).detach() first.")
    if config.always_keep + config.keep_last >= len(layers):
        raise NotRoutable(f"always_keep={config.always_keep} and keep_last={config.keep_last} "
                          f"leave none of the model's {len(layers)} layers to route; together they "
                          f"must be below {len(layers)}.")
    if config.skip_adapter_rank and config.unit != "layer":
        raise NotRoutable(f"skip_adapter_rank={config.skip_adapter_rank} stands in for whole "
                          f"layers, and unit={config.unit!r} skips parts of them. Use "
                          "unit='layer', or skip_adapter_rank=0.")
    attention = base.config.get_text_config()._attn_implementation
    if config.kv == "drop" and attention not in ANY_MASK:
        raise NotRoutable("kv='drop' needs an attention that takes any mask; load the model with "
                          "attn_implementation='sdpa' or 'eager'.")
    refuse_layerdrop(decoder)


def _compile_with_hooks() -> None:
    """Has torch.compile notice hooks: a graph made without them would run a routed model dense."""
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()                                      # graphs made before
