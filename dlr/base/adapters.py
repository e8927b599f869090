"""PEFT adapters on a routed model: which one is active, the base without it, and its files.

Adapters come from PEFT (`get_peft_model`) or from transformers itself (`model.add_adapter`). An
adapter that could not be loaded again as it was trained is refused before it is saved.
"""

import contextlib
import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dlr.base.folder import ADAPTER, ADAPTER_CONFIG
from dlr.routing.router import ROUTER_NAME
from dlr.routing.weights import base_tensors, causal_lm

# values of `init_lora_weights`, by their beginnings, that subtract from the base's weights
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NotSaveable(ValueError):
    """The model holds something trained that a checkpoint would lose."""


# -- which adapter --------------------------------------------------------------------------------
def _wrapped(base: nn.Module) -> bool:
    return any(hasattr(module, "adapter_layer_names") or hasattr(module, "original_module")
               for module in base.modules())


def adapted_already(model: nn.Module) -> bool:
    """Whether `model` carries an adapter of any kind."""
    return bool(getattr(model, "peft_config", None)) or _wrapped(causal_lm(model))


def adapted(model: nn.Module, routing) -> nn.Module | None:
    """The model that knows its adapters: `model`, or the one the router was attached to, or None.

    Raises:
        NotSaveable: the model holds adapter layers that neither model knows.
    """
    from_peft = hasattr(model, "get_base_model") and getattr(model, "peft_config", None)
    if from_peft or getattr(model, "_hf_peft_config_loaded", False):
        return model
    if not _wrapped(causal_lm(model)):
        return None
    if getattr(routing.model, "peft_config", None) and causal_lm(routing.model) is causal_lm(model):
        return routing.model
    raise NotSaveable("The model holds adapter layers that were put in by hand; pass the PEFT "
                      "model that get_peft_model returned.")


def active_adapter(model: nn.Module) -> str:
    """The name of the one adapter in force.

    Raises:
        NotSaveable: several are active at once.
    """
    active = model.active_adapters
    active = list(active() if callable(active) else active)
    if len(active) != 1:
        raise NotSaveable(f"{len(active)} adapters are active at once ({', '.join(active)}); a "
                          "checkpoint holds one. Join them (add_weighted_adapter) or activate one "
                          "(set_adapter).")
    return active[0]


# -- the base without it --------------------------------------------------------------------------
@contextlib.contextmanager
def without_adapters(model: nn.Module, routing):
    """Switches adapters off for the duration, whichever library put them on the base.

    Raises:
        ValueError: the adapters train the base's own biases, so the base is gone.
    """
    carrier = adapted(model, routing)
    if carrier is None:
        yield
        return
    for name, config in carrier.peft_config.items():
        _refuse_changed_base(name, config)
        if getattr(config, "bias", "none") != "none":
            raise ValueError(f"The adapter {name!r} trains the base model's own biases "
                             f"(bias={config.bias!r}), so the base model can no longer be run "
                             "beside it; use bias='none'.")
    by_peft = hasattr(carrier, "disable_adapter")
    flags = [(parameter, parameter.requires_grad) for parameter in carrier.parameters()]
    try:
        with carrier.disable_adapter() if by_peft else _disabled_by_transformers(carrier):
            yield
    finally:
        # both libraries turn gradients on when they enable adapters again
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _disabled_by_transformers(model):
    were_off = any(getattr(module, "disable_adapters", None) is True for module in model.modules())
    model.disable_adapters()
    try:
        yield
    finally:
        if not were_off:
            model.enable_adapters()


# -- saving ---------------------------------------------------------------------------------------
def _state(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict  # takes seconds to import
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _refuse_changed_base(name: str, config) -> None:
    method = getattr(config, "init_lora_weights", True)
    if isinstance(method, str) and method.lower().startswith(_CHANGE_THE_BASE):
        raise NotSaveable(f"The adapter {name!r} began with init_lora_weights={method!r}, which "
                          "changes the base model's own weights: neither is the base there to "
                          "compare with, nor would a checkpoint fit it. Use True or 'gaussian'.")


def refuse_unsaveable_adapter(model: nn.Module) -> str:
    """The name of the adapter that a checkpoint of `model` would hold.

    Raises:
        NotSaveable: something was trained or changed that the adapter's files would not hold.
    """
    name = active_adapter(model)
    config = model.peft_config[name]
    _refuse_changed_base(name, config)
    state = _state(model, name)
    if not state:
        raise NotSaveable(f"The adapter {name!r} has no weights in the model any more; was it "
                          "merged or unloaded? Save before merging, or save the merged model "
                          "itself (save_pretrained) and attach a router to that.")
    on_meta = [key for key, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise NotSaveable(f"The adapter {name!r} holds no weights ({on_meta[0]!r} is on 'meta'): "
                          "PEFT put it where the offloaded base was. Add the adapter before the "
                          "base is offloaded.")
    saved = {tensor.data_ptr() for tensor in state.values()}
    others = tuple(other for other in model.peft_config if other != name)
    base = {id(tensor) for _, tensor in base_tensors(model)}
    lost = [key for key, parameter in model.named_parameters()
            if parameter.requires_grad and ROUTER_NAME not in key
            and parameter.data_ptr() not in saved
            and (id(parameter) in base or not config.is_prompt_learning)
            and not any(f".{other}." in f"{key}." for other in others)]
    if lost:
        raise NotSaveable(f"{len(lost)} parameters are trained that a checkpoint would not hold: "
                          f"{', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}. Name their "
                          "modules in the adapter's modules_to_save, or freeze them "
                          "(requires_grad_(False)) before training.")
    if others:
        warnings.warn(f"The model has {len(others) + 1} adapters; the checkpoint holds the active "
                      f"one, {name!r}, and not {', '.join(others)}.", stacklevel=3)
    return name


def write_adapter(model: nn.Module, name: str, folder: Path, base_name: str) -> None:
    """Writes PEFT's two files of the adapter `name` into an existing folder."""
    prefix = "" if hasattr(model, "get_base_model") else "base_model.model."
    tensors = {prefix + key: tensor.detach().cpu().contiguous().clone()
               for key, tensor in _state(model, name).items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    settings = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
    settings |= {"inference_mode": True, "base_model_name_or_path": base_name}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(value)


# -- loading --------------------------------------------------------------------------------------
def load_adapter(model: nn.Module, folder: Path, is_trainable: bool = False,
                 name: str = "default") -> nn.Module:
    """`model` with the adapter in `folder` on it, all of whose weights were used.

    Raises:
        ValueError: the model carries adapters already, or the adapter's weights do not fit it.
    """
    from peft import PeftModel  # takes seconds to import
    if adapted_already(model):
        raise ValueError(f"This {type(causal_lm(model)).__name__} carries adapters already; give "
                         "the base model without them (model.unload()).")
    with safe_open(folder / ADAPTER, "pt") as file:
        stored = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    half_precision = any(dtype in ("BF16", "F16") for dtype in stored.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")    # refused below
        try:
            # by default PEFT would turn half precision into float32
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable,
                                              adapter_name=name,
                                              autocast_adapter_dtype=not half_precision)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"The adapter in {str(folder)!r} does not fit this model, or its "
                             f"{ADAPTER_CONFIG} is not what PEFT wrote: {type(error).__name__}: "
                             f"{error}") from error
    state = _state(model, name)
    if not hasattr(model, "hf_device_map") and any(tensor.is_meta for tensor in state.values()):
        raise ValueError("The base model's weights are offloaded, and PEFT put the adapter where "
                         "they are: nowhere, so that it would hold nothing. Give the base in "
                         "memory (load_in_4bit=True makes it a quarter), or loaded with a "
                         "device_map.")
    wrong = sorted(stored.keys() ^ state.keys())
    if wrong:
        raise ValueError(f"The adapter in {str(folder)!r} does not fit this model; first "
                         f"difference: {wrong[0]!r}.")
    return model if is_trainable else model.requires_grad_(False)


@contextlib.contextmanager
def as_it_was(model: nn.Module):
    """Puts modules, flags and vectors of `model` back where they were if the block raises."""
    base = causal_lm(model)
    modules = {module: (dict(module._modules), module.training) for module in base.modules()}
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    vectors = [(parameter, parameter.detach().clone()) for parameter in base.parameters()
               if parameter.ndim == 1 and not parameter.is_meta]       # an adapter may bring biases
    attributes = dict(base.__dict__)
    try:
        yield
    except BaseException:
        for name in base.__dict__.keys() - attributes.keys():
            del base.__dict__[name]
        base.__dict__.update(attributes)
        for module, (children, training) in modules.items():
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        with torch.no_grad():
            for parameter, values in vectors:
                parameter.copy_(values)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
