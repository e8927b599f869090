"""How a plan is carried out: masked execution, in one pass or in the original two.

Masked execution runs every layer for every token and blends `g * layer(x) + (1 - g) * x`. A skipped token still leaves
that layer's own keys and values (K/V complete), because the layer has seen it. It is the reference that any faster
execution must equal.
"""

import inspect

import torch


class _Stop(Exception):
    """Ends the first of two passes once the plan is made."""


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


def argument_names(layer) -> list[str]:
    """Names of the arguments of a layer's forward, the hidden states first."""
    return list(inspect.signature(type(layer).forward).parameters)[1:]


def blend_layer(routing, unit: int):
    """A forward hook that blends a layer's output with its input by the gate of `unit`."""

    def hook(module, args, kwargs, output):
        gate = routing.gate(unit)
        if gate is None:
            return None
        ran = _first(output)
        kept = routing.router.skipped(unit, args[0] if args else kwargs["hidden_states"])
        if gate.requires_grad:
            gate = gate.to(ran.dtype)
            return _with_first(output, gate * ran + (1 - gate) * kept)
        return _with_first(output, torch.where(gate > 0.5, ran, kept))

    return hook


def gate_sublayer(routing, unit: int):
    """A forward hook that multiplies what attention or the MLP adds to the residual by the gate of `unit`."""

    def hook(module, args, output):
        gate = routing.gate(unit)
        if gate is None:
            return None
        ran = _first(output)
        return _with_first(output, gate.to(ran.dtype) * ran)

    return hook


def hide_skipped_keys(routing, unit: int, layer):
    """A forward pre-hook for kv='drop': a layer's attention sees no keys of tokens that skip it, but each token itself.

    As in Mixture-of-Depths (Raposo et al. 2024) and D-LLM (Jiang et al. 2024), where a skipped token leaves nothing.
    """

    names = argument_names(layer)

    def hook(module, args, kwargs):
        gate = routing.gate(unit)
        if gate is None:
            return None
        kwargs = dict(zip(names, args)) | kwargs
        mask, length = kwargs.get("attention_mask"), gate.shape[1]
        seen = (gate.detach() > 0.5).transpose(1, 2).unsqueeze(1)                          # [b, 1, 1, s]
        seen = seen | torch.eye(length, dtype=torch.bool, device=gate.device)
        if mask is None:
            mask = seen & torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return (kwargs.pop(names[0]),), kwargs | {"attention_mask": mask}

    return hook


def needs_first_pass(routing) -> bool:
    """Whether the plan must come from a pass of its own."""
    return routing.config.strategy == "two_pass" and routing.policy.reads_hidden


def run_first_pass(routing, decoder, args, kwargs) -> None:
    """Runs the decoder up to layer K, lets the policy make the plan, and stops.

    Raises:
        ValueError: a key/value cache was given; the second pass would find the first one's keys in it.
    """
    current = routing._pass
    if current.cache is not None:
        raise ValueError("strategy='two_pass' has no cached form: pass use_cache=False, or use strategy='single_pass', "
                         "which gives the same result.")
    current.first_pass = True

    def stop(module, layer_args, layer_kwargs):
        raise _Stop

    handle = routing.layers[routing.first].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(*args, **{**kwargs, "use_cache": False})
    except _Stop:
        pass
    finally:
        handle.remove()
        current.first_pass = False
