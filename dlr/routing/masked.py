"""How a plan is carried out: masked execution, in one pass or in the original two.

Masked execution runs every layer for every token and blends `g * layer(x) + (1 - g) * x`. A skipped
token still leaves that layer's own keys and values (K/V complete), because the layer has seen it.
It is the reference that any faster execution must equal.

The hooks are objects, not closures: a copy of the model has copies of them, which ask the copy's
own routing.
"""

import inspect
from dataclasses import dataclass

import torch


class FirstPassDone(Exception):
    """Ends the first of two passes once the plan is made."""


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(output, value):
    return (value, *output[1:]) if isinstance(output, (tuple, list)) else value


def argument_names(layer) -> list[str]:
    """Names of the arguments of a layer's forward, the hidden states first."""
    return list(inspect.signature(type(layer).forward).parameters)[1:]


@dataclass(eq=False)
class BlendLayer:
    """A forward hook that blends a layer's output with its input by the gate of `unit`."""
    routing: object
    unit: int

    def __call__(self, module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        gate = self.routing.gate(self.unit, hidden)
        if gate is None:
            return None
        ran, skipped = self.routing.router.paths(self.unit, hidden, _first(output),
                                                 self.routing.threshold)
        gate = gate.to(ran.device)
        if gate.requires_grad:
            gate = gate.to(ran.dtype)
            return _with_first(output, gate * ran + (1 - gate) * skipped)
        return _with_first(output, torch.where(gate > 0.5, ran, skipped))


@dataclass(eq=False)
class GateSublayer:
    """A forward hook that multiplies what attention or the MLP adds by the gate of `unit`.

    A router that goes layer by layer reads what that module is given.
    """
    routing: object
    unit: int

    def __call__(self, module, args, kwargs, output):
        gate = self.routing.gate(self.unit, next(iter((*args, *kwargs.values()))))
        if gate is None:
            return None
        ran = _first(output)
        return _with_first(output, gate.to(ran.device, ran.dtype) * ran)


@dataclass(eq=False)
class HideSkippedKeys:
    """A forward pre-hook for kv='drop': attention sees no keys of skipping tokens but their own.

    As in Mixture-of-Depths (Raposo et al. 2024) and D-LLM (Jiang et al. 2024), which keep none.
    """
    routing: object
    unit: int
    names: list[str]                  # of the layer's arguments

    def __call__(self, module, args, kwargs):
        kwargs = dict(zip(self.names, args)) | kwargs
        gate = self.routing.gate(self.unit, kwargs[self.names[0]])
        if gate is None:
            return None
        mask = kwargs.get("attention_mask")
        length = gate.shape[1]
        seen = (gate.detach() > 0.5).transpose(1, 2).unsqueeze(1)  # [b, 1, 1, s]
        seen = seen | torch.eye(length, dtype=torch.bool, device=gate.device)
        if mask is None:
            mask = seen & torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return (kwargs.pop(self.names[0]),), kwargs | {"attention_mask": mask}


def run_first_pass(plan, decoder, args, kwargs) -> None:
    """Runs the decoder up to layer K, where the policy makes the plan, and stops.

    Raises:
        ValueError: a cache was given; the second pass would find the first one's keys in it.
    """
    if plan.cache is not None:
        raise ValueError("strategy='two_pass' has no cached form: pass use_cache=False, or use "
                         "strategy='single_pass', which gives the same result.")
    plan.first_pass = True
    try:
        decoder(*args, **{**kwargs, "use_cache": False})
    except FirstPassDone:
        pass
    finally:
        plan.first_pass = False
