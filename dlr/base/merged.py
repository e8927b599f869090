"""LoRA merged for a while: one product a layer instead of three, and a base that nobody writes to.

PEFT merges by adding to the base's weights and comes back by subtracting, which rounds. Here the
sums are tensors of their own, which stand in for the layers' forwards in one thread and one block.
Fingerprints, checkpoints and other threads see the base as it is all the while.
"""

import copy

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dlr.routing.intercept import Standin
from dlr.routing.weights import causal_lm


class merged:
    """Context: in this thread `model` runs with its active LoRA merged. It may be entered again.

    It takes memory for a second copy of the weights that LoRA is on. Adapters that are switched
    off or exchanged in the block (`frozen_base`) run as PEFT runs them.

    Attributes:
        said: what was merged, or what could not be and why; '' where there are no adapters.
    """

    def __init__(self, model: nn.Module):
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds to import
        layers = [m for m in causal_lm(model).modules() if isinstance(m, BaseTunerLayer)]
        obstacles = {layer: _obstacle(layer) for layer in layers}
        able = [layer for layer in layers if not obstacles[layer]]
        if not _room(able):
            obstacles, able = dict.fromkeys(layers, "no memory for a second copy of weights"), []
        self.forwards = {layer: _Sum(layer) for layer in able}
        why = "; ".join(sorted({why for why in obstacles.values() if why}))
        share = "" if len(able) == len(layers) else f" in {len(able)} of {len(layers)} layers"
        self.said = "" if not layers else \
            f"LoRA not merged: {why}" if not able else \
            f"LoRA merged for the run{share}" + (f" ({why})" if why else "")

    def __enter__(self):
        try:
            for layer, forward in self.forwards.items():
                Standin.put(layer, forward, as_own=True)
        except BaseException:                              # an interrupt before the block has begun
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        try:
            self._take()
        except BaseException:                              # an interrupt half-way: to the end
            self._take()
            raise

    def _take(self) -> None:
        for layer in self.forwards:
            Standin.take(layer, as_own=True)


class _Sum:
    """The forward of a LoRA layer by one product with base and adapters summed."""

    @torch.no_grad()
    def __init__(self, layer: nn.Module):
        self.layer, self.active = layer, list(layer.active_adapters)
        base = layer.get_base_layer()
        weight = base.weight.detach().clone()
        for name in self.active:
            if name in layer.lora_A:
                weight += layer.get_delta_weight(name).to(weight)
        self.product = copy.copy(base)
        self.product._parameters = base._parameters | {"weight": nn.Parameter(weight, False)}

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        layer = self.layer
        as_then = not layer.disable_adapters and layer.active_adapters == self.active
        if as_then and not layer.merged and not args and not kwargs:
            return self.product(x)
        return type(layer).forward(layer, x, *args, **kwargs)


def _obstacle(layer: nn.Module) -> str:
    """Why an adapter layer cannot be merged; '' where it can."""
    from peft.tuners.lora import Linear
    base = layer.get_base_layer()
    if type(layer) is not Linear or type(base) not in (nn.Linear, Conv1D):
        method = type(layer).__module__.split(".")[2]          # peft.tuners.METHOD.layer
        return f"{method} on {type(base).__name__} cannot be"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "lora with magnitudes, biases or the like cannot be"
    if layer.merged:
        return "it is in the base already"
    if layer.disable_adapters:
        return "it is switched off"
    if layer.training:
        return "the model is in training"
    exchanged = "forward" in base.__dict__ or (
        "forward" in layer.__dict__ and Standin.of(layer) is None)
    if exchanged or base._forward_hooks or base._forward_pre_hooks or base.weight.is_meta:
        return "weights are offloaded or watched"
    return ""


def _room(layers: list[nn.Module]) -> bool:
    """Whether memory holds another copy of the weights under `layers`."""
    needed: dict[torch.device, int] = {}
    for layer in layers:
        weight = layer.get_base_layer().weight
        needed[weight.device] = needed.get(weight.device, 0) + weight.nbytes
    return all(size < _free(device) for device, size in needed.items())


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
