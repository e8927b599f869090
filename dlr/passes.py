"""One forward pass as the hooks know it, read off the arguments of the model and of its decoder.

Notation: b batch, s sequence, U units, d width.
"""

from dataclasses import dataclass

import torch

from dlr.families import CACHES
from dlr.memory import Memory, memory_of


@dataclass
class Pass:
    """What the hooks know about the forward pass in progress.

    Attributes:
        real: `[b, s]` bool, False at padding. position: `[b, s]` place among the real tokens of the row, from 0.
        cache: the key/value cache, or None. past: whether it holds anything (None: only the device knows).
        seen: tokens in the cache after this pass.
        new: tokens in front that are no candidates of assisted decoding, which are there to be verified.
        memory: what the cache remembers, and is to remember after this pass.
        gates, logits: `[b, s, U]`, once the plan is made.
        keep, rows: in a compact pass, gates of real tokens as bool, and a `rows.Rows` a unit (None: all run it).
    """
    real: torch.Tensor
    position: torch.Tensor
    cache: object = None
    past: bool | None = False
    seen: int | torch.Tensor = 0
    new: int = 0
    memory: Memory | None = None
    gates: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    first_pass: bool = False
    compact: bool = False
    keep: torch.Tensor | None = None
    rows: list | None = None


def _tokens_in(cache) -> int | torch.Tensor:
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:                                     # recurrent states alone (Mamba): no layer of it counts
        memory = memory_of(cache)
        return 0 if memory is None else memory.seen


def asked_of_model(kwargs: dict) -> dict:
    """What the decoder is not told, of a causal LM's arguments: the plain padding mask, and whose logits are wanted."""
    mask, wanted = kwargs.get("attention_mask"), kwargs.get("logits_to_keep")
    return {"mask": mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
            "wanted": wanted if isinstance(wanted, int) else 0}


def pass_of(args: tuple, kwargs: dict, asked: dict) -> Pass:
    """The pass that a decoder call begins; `asked` is what `asked_of_model` found in the model's own call."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs.get("inputs_embeds")
    given = ids if ids is not None else embeds             # ids, or states where the decoder gets those (BERT and kin)
    (batch, length), device = given.shape[:2], given.device
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    past = _tokens_in(cache)                               # a tensor in static caches: not brought to the host
    place = torch.arange(length, device=device) + past
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        mask = asked.get("mask")
        if mask is not None and (mask.shape[0] != batch or mask.shape[1] < length):
            mask = None
    wanted = asked.get("wanted", 0)
    about = {"cache": cache, "seen": past + length, "past": past > 0 if isinstance(past, int) else None,
             "new": length - (wanted - 1) if 0 < wanted <= length else length}
    if mask is not None:
        mask, place = mask.to(device), place.clamp(max=mask.shape[1] - 1)
        return Pass(mask[:, place].bool(), mask.long().cumsum(1)[:, place] - 1, **about)
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    return Pass(real, place.expand(batch, length), **about)


def records_more(decoder, kwargs: dict) -> bool:
    """Whether the call asks for a record of what layers compute inside (attention maps, expert choices): every layer must
    then run in full, or the record has fewer entries than layers."""
    names = {f"output_{name}" for name in getattr(decoder, "_can_record_outputs", None) or {}} | {"output_attentions"}
    asked = {name: kwargs.get(name) for name in names - {"output_hidden_states"}}
    config = getattr(decoder, "config", None)
    return any(getattr(config, name, False) if value is None else value for name, value in asked.items())
