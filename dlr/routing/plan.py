"""The plan of one forward pass: what is known of the pass, and which tokens run which layers.

Notation: b batch, s sequence, U routable units (one a layer, or two where attention and MLP are
gated apart).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dlr.routing.families import CACHES
from dlr.routing.memory import Memory, memory_of


@dataclass(repr=False)
class Plan:
    """One forward pass, from the decoder's call to its end, and the gates of its tokens.

    Attributes:
        gates: `[b, s, U]`, 1 = run; None until decided. In training they carry gradients.
        logits: `[b, s, U]` router logits, or None for plans that no router made.
        real: `[b, s]` bool, False at padding; padding never counts.
        always_keep: layers every token ran before or after the routable ones.
        position: `[b, s]` place among the real tokens of the row, from 0, or what `position_ids`
            say: each of several documents in a row then has first tokens of its own.
        steps: (gate, logit) `[b, s, 1]` of each unit so far, of a router that goes layer by layer.
        first_pass: whether this is the first of two passes.
        compact: whether only what the gates keep is computed.
        harm: `[b, s, M]` nats that a depth router predicts; None in training, and of other routers.

    Of the pass in progress alone; `end` lets go of it:
        cache: the key/value cache, or None.
        past: whether it holds anything (None: only the device knows).
        seen: tokens in the cache after this pass.
        new: tokens in front of the candidates of assisted decoding, which are to be verified.
        memory: what the cache remembers, and is to remember after this pass.
        runs: `[b, s, U]` bool of a compact pass, False at padding.
        rows: of a compact pass, a `rows.Rows` a unit (None: all run it).
    """
    gates: torch.Tensor | None
    logits: torch.Tensor | None
    real: torch.Tensor
    always_keep: int
    units_per_layer: int = 1
    position: torch.Tensor | None = None
    cache: object = None
    past: bool | None = False
    seen: int | torch.Tensor = 0
    new: int = 0
    memory: Memory | None = None
    first_pass: bool = False
    compact: bool = False
    steps: list | None = None
    runs: torch.Tensor | None = None
    rows: list | None = None
    harm: torch.Tensor | None = None

    def __repr__(self) -> str:
        if self.gates is None:
            return "Plan(not decided yet)"
        batch, length, units = self.gates.shape
        return f"Plan({batch} x {length} tokens, {units} units, {self.skip_ratio:.1%} skipped)"

    @classmethod
    def begin(cls, args: tuple, kwargs: dict, asked: dict, always_keep: int,
              units_per_layer: int) -> "Plan":
        """The plan that a decoder's call begins; `asked`: see `asked_of_model`."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        inputs = ids if ids is not None else kwargs.get("inputs_embeds")   # or states, in BERT
        batch, length = inputs.shape[:2]
        device = inputs.device
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past = _tokens_in(cache)  # a tensor in static caches: not brought to the host
        place = torch.arange(length, device=device) + past
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            mask = asked.get("mask")
            if mask is not None and (mask.shape[0] != batch or mask.shape[1] < length):
                mask = None
        if mask is not None:
            mask = mask.to(device)
            place = place.clamp(max=mask.shape[1] - 1)
            real, position = mask[:, place].bool(), mask.long().cumsum(1)[:, place] - 1
        else:
            real = torch.ones(batch, length, dtype=torch.bool, device=device)
            position = place.expand(batch, length)
        given = kwargs.get("position_ids")
        if isinstance(given, torch.Tensor) and given.shape in ((batch, length), (1, length)):
            position = torch.where(real, given.to(device).long(), position)   # of packed documents
        wanted = asked.get("wanted", 0)
        new = length - (wanted - 1) if 0 < wanted <= length else length
        return cls(None, None, real, always_keep, units_per_layer, position, cache,
                   past > 0 if isinstance(past, int) else None, past + length, new)

    def end(self) -> None:
        """Lets go of what only the pass needs: a plan that is kept must not keep a cache."""
        self.cache = self.memory = self.runs = self.rows = None

    def opened(self, gates: torch.Tensor, tokens: int) -> torch.Tensor:
        """`gates` `[b, s, ...]`, open for the first `tokens` of every sequence."""
        if not tokens:
            return gates
        return torch.where((self.position < tokens).unsqueeze(-1), torch.ones_like(gates), gates)

    @property
    def kept(self) -> torch.Tensor:
        """Hard gates of real tokens, `[n, U]` float."""
        return (self.gates.detach()[self.real] > 0.5).float()

    @property
    def keep_rate(self) -> torch.Tensor:
        """Mean gate over real tokens, one number a unit `[U]`."""
        return self.kept.mean(0)

    @property
    def skip_ratio(self) -> float:
        """1 - mean gate over real tokens and routable units."""
        return skip_ratio(self.kept)

    @property
    def active_layers(self) -> torch.Tensor:
        """Layers each token ran, `[b, s]`."""
        return active_layers(self.gates.detach() > 0.5, self.always_keep, self.units_per_layer)

    @property
    def budget(self) -> torch.Tensor:
        """Mean gate over real tokens and units, a scalar with gradients."""
        return self.gates[self.real].mean()


def _tokens_in(cache) -> int | torch.Tensor:
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # recurrent states alone (Mamba): no layer of it counts
        memory = memory_of(cache)
        return 0 if memory is None else memory.seen


def asked_of_model(kwargs: dict) -> dict:
    """What the decoder is not told: the plain padding mask, and how many logits are wanted."""
    mask, wanted = kwargs.get("attention_mask"), kwargs.get("logits_to_keep")
    return {"mask": mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
            "wanted": wanted if isinstance(wanted, int) else 0}


def skip_ratio(gates: torch.Tensor) -> float:
    """1 - mean gate over tokens and units, of hard gates `[n, U]`."""
    return 1.0 - gates.float().mean().item()


def active_layers(gates: torch.Tensor, always: int, units_per_layer: int) -> torch.Tensor:
    """Layers each token ran, of hard gates `[..., U]`; halves where units are sublayers."""
    return always + gates.sum(-1) / units_per_layer


def gate_entropy(probabilities: torch.Tensor) -> float:
    """Mean binary entropy of keep probabilities (any shape), in nats; 0: all are certain."""
    return float(binary_entropy(probabilities.detach()).mean())


def binary_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Of each probability, in nats, with gradients where it is not certain."""
    p = probabilities.float().clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def static_gates(units: int, dropped: list[int]) -> torch.Tensor:
    """The static gate vector `[U]` that drops the given units."""
    gates = torch.ones(units)
    gates[dropped] = 0.0
    return gates


class StaticPair(NamedTuple):
    """Two neighbouring static plans `[U]`, and the second's share in a mixture of a given skip."""
    fewer: torch.Tensor
    more: torch.Tensor
    share_more: float

    def mean(self, under_fewer, under_more):
        """The expected value where a document runs the second plan with chance `share_more`."""
        return under_fewer * (1 - self.share_more) + under_more * self.share_more


def static_pair(order: list[int], units: int, skip: float, forced: float = 0.0) -> StaticPair:
    """Two neighbouring static plans along `order`, whose mean skip ratio is `skip`.

    `forced` is the share of tokens that run everything whatever the plan (kept first tokens).

    Raises:
        ValueError: no static plan skips as much.
    """
    exact = skip * units / (1 - forced)
    if units < exact < units * (1 + 1e-6):  # a router that closes every gate, but for rounding
        exact = float(units)
    if not 0 <= exact <= units:
        raise ValueError(f"A skip ratio of {skip} needs {exact:.2f} units dropped; this model has "
                         f"{units}.")
    whole = min(int(exact), units - 1)
    return StaticPair(static_gates(units, order[:whole]), static_gates(units, order[:whole + 1]),
                      exact - whole)
