"""The router: a small float32 network from the state after layer K to one logit a routable unit.

Notation: b batch, s sequence, d width, U routable units. Gumbel straight-through gates: Jang et al.
2017, Maddison et al. 2017; straight-through estimator: Bengio et al. 2013.
"""

import importlib
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dlr.routing.config import RouterConfig
from dlr.routing.skip import SkipAdapters, normed
from dlr.settings import SettingsError

ROUTER_NAME = "dlr_router"          # the attribute of the base model that holds it


class Dense(nn.Module):
    """A linear layer that PEFT's target_modules="all-linear" does not take for the base's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers with GELU between."""
    return nn.Sequential(Dense(inputs, hidden), nn.GELU(), Dense(hidden, hidden), nn.GELU(),
                         Dense(hidden, outputs))


class Router(nn.Module):
    """RMSNorm and a small network, and (optionally) the adapters past skipped units.

    Another router is a subclass, named by `RouterConfig.router_class`, in a file `router_*.py`
    beside this one or anywhere that is imported first. With `ahead = False` it is asked layer by
    layer: `forward(hidden, unit)` gets the state `[b, s, d]` before the unit's layer (what the
    unit's module is given, where units are sublayers) and returns that unit's logits `[b, s, 1]`.
    No plan is known ahead then, so such a router runs masked only. `router_layers` is a start.

    It lives inside the base model's module tree, so that optimizers, clipping and DDP see its
    parameters, but keeps out of the base model's `state_dict`: its weights belong to router files
    (see `weights`).
    """

    ahead: ClassVar[bool] = True
    # whether a token's gates depend on what lies before it alone; if not, no cache is gone on from
    causal: ClassVar[bool] = True

    def __init__(self, width: int, units: int, config: RouterConfig):
        super().__init__()
        self.width, self.units = width, units
        self.build(config)
        rank = config.skip_adapter_rank
        self.skip = SkipAdapters(width, units, rank) if rank else None
        self.register_load_state_dict_post_hook(self._not_missing)

    def build(self, config: RouterConfig) -> None:
        """Makes the network; a subclass with another one has its own."""
        self.net = network(self.width, config.router_hidden, self.units)
        nn.init.normal_(self.net[-1].weight, std=0.01)
        nn.init.constant_(self.net[-1].bias, config.keep_bias)

    def forward(self, hidden: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """Router logits `[..., U]` (float32).

        Args:
            hidden: `[..., d]` states before layer K.
            position: `[...]` place among the real tokens of the sequence, from 0.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net(normed(hidden))

    def judged(self, hidden: torch.Tensor, position: torch.Tensor | None) -> tuple:
        """(predicted harms `[..., M]` of a book's plans or None, logits `[..., U]`)."""
        return None, self(hidden, position)

    def draw(self, hidden: torch.Tensor, position: torch.Tensor | None,
             threshold: float | torch.Tensor, temperature: float,
             noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(gates, logits) `[..., U]` in training: gates are 0 or 1 and carry gradients."""
        logits = self(hidden, position)
        return straight_through_gates(logits, threshold, temperature, noise), logits

    def step(self, hidden: torch.Tensor, unit: int, plan, threshold: float | torch.Tensor,
             temperature: float | None = None,
             noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate, logit) `[b, s, 1]` of one unit, of a router that is asked layer by layer.

        Args:
            plan: of the pass in progress: which tokens are real, and where they stand.
            temperature: of drawn gates, in training; None: those of evaluation.
        """
        logit = self(hidden, unit)
        if temperature is None:
            return hard_gates(logit, threshold), logit
        return straight_through_gates(logit, threshold, temperature, noise), logit

    def skipped(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """What a token carries past a unit that it skips: x, or what the unit's adapter gives."""
        return x if self.skip is None else self.skip(unit, x)

    def paths(self, unit: int, x: torch.Tensor, ran: torch.Tensor,
              threshold: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a token carries on after a layer, if it runs it and if not: `[b, s, d]` each.

        A subclass with soft weights has its own; they hold whatever plan is followed.

        Args:
            x: the state before the layer.
            ran: what the layer makes of it.
        """
        return ran, self.skipped(unit, x)

    # The base model's state_dict must not change when a router is attached.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return {} if destination is None else destination

    @staticmethod
    def _not_missing(module, incompatible) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if f"{ROUTER_NAME}." not in key]

    def stored(self) -> dict[str, torch.Tensor]:
        """Name to tensor of all that a router file holds: parameters, and buffers that persist."""
        buffers = {name: buffer for name, buffer in self.named_buffers()
                   if name not in self._non_persistent_buffers_set}
        return dict(self.named_parameters()) | buffers

    def weights(self) -> dict[str, torch.Tensor]:
        """What a router file holds, contiguous on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.stored().items()}

    def adapters(self) -> dict[str, torch.Tensor]:
        """The part of `weights` that is the skip adapters'; it goes with any plan."""
        return {name: tensor for name, tensor in self.weights().items()
                if name.startswith("skip.")}

    @classmethod
    def sizes(cls, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(width, units) by a router's weights; a subclass with another network has its own."""
        ends = ("net.0.weight", "net.4.bias")
        first, last = (tensors.get(name, torch.empty(1)).shape[-1:] for name in ends)
        return (*(first or (1,)), *(last or (1,)))

    @classmethod
    def refuse_unfit(cls, tensors: dict[str, torch.Tensor], config: RouterConfig,
                     adapters_only: bool = False) -> None:
        """Raises ValueError, before a router is built, where `tensors` are none of its weights."""
        sizes = cls.sizes(tensors)
        if adapters_only:
            ups = [tensor for name, tensor in tensors.items() if name.startswith("skip.up.")]
            sizes = (ups[0].shape[0], len(ups)) if ups else (1, 1)
        with torch.device("meta"):
            cls(*sizes, config)._fits(tensors, adapters_only)
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError("These router weights hold infinite or undefined numbers "
                             f"({broken[0]!r}): the training that wrote them diverged, or the file "
                             "was damaged.")

    def _fits(self, tensors: dict[str, torch.Tensor],
              adapters_only: bool = False) -> dict[str, torch.Tensor]:
        stored = {name: tensor for name, tensor in self.stored().items()
                  if name.startswith("skip.") or not adapters_only}
        wrong = sorted(stored.keys() ^ tensors.keys())
        wrong = wrong or [name for name, tensor in stored.items()
                          if tensor.shape != tensors[name].shape]
        if wrong:
            raise ValueError("These router weights do not fit this router; first difference: "
                             f"{wrong[0]!r}.")
        return stored

    def load_weights(self, tensors: dict[str, torch.Tensor], adapters_only: bool = False) -> None:
        """Copies `tensors` in; raises ValueError where names or shapes differ."""
        with torch.no_grad():
            for name, tensor in self._fits(tensors, adapters_only).items():
                tensor.copy_(tensors[name])


def router_class(name: str) -> type[Router]:
    """The class that `RouterConfig.router_class` names.

    Raises:
        SettingsError: there is none of that name; the message names those there are.
    """
    def known() -> dict[str, type[Router]]:
        classes = [Router]
        for kind in classes:  # the list grows meanwhile: subclasses of subclasses too
            classes += kind.__subclasses__()
        return {kind.__name__: kind for kind in classes}
    if name not in known():
        for file in sorted(Path(__file__).parent.glob("router_*.py")):
            importlib.import_module(f"{__package__}.{file.stem}")
    if name not in known():
        raise SettingsError(f"router_class={name!r} is no router; there are "
                            f"{', '.join(sorted(known()))}. Import the file that defines it first, "
                            "or put it beside dlr's own as router_NAME.py.")
    return known()[name]


def hard_gates(logits: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Deterministic gates at evaluation: 1.0 where logit > threshold."""
    return (logits > threshold).float()


def straight_through_gates(logits: torch.Tensor, threshold: float | torch.Tensor,
                           temperature: float, noise: float = 1.0) -> torch.Tensor:
    """Hard 0/1 gates forward, gradient of the relaxed gates backward (binary Gumbel-softmax).

    Args:
        noise: scale of the noise; at 0 the gates are those of evaluation.
    """
    shifted = logits - threshold
    if noise:
        uniform = torch.rand_like(shifted).clamp(1e-6, 1 - 1e-6)
        shifted = shifted + noise * (uniform.log() - (1 - uniform).log())    # of two Gumbels
    soft = torch.sigmoid(shifted / temperature)
    hard = (soft > 0.5).float()
    return hard + soft - soft.detach()
