"""Logits of a long text in bounded memory: the model runs once, its head on a few rows at a time.

A text of 32,000 tokens under a vocabulary of 152,000 has logits of 20 GB. What follows the decoder
(head, soft caps, scales) is each family's own and works row by row, so the family's own code is
given the decoder's rows in chunks.

Notation: s tokens of the text, V vocabulary.
"""

import dataclasses
import inspect
import threading
from collections.abc import Callable

import torch
from torch import nn

from dlr.routed import Routing, causal_lm

# Logits held at a time: 50 MB in float32. Blocks above 32 MB go back to the system at once; smaller
# ones would stay in the C library's heap, which then grows all the same.
ELEMENTS = 3 * 2**22


def last_only(model) -> dict:
    """What to pass to a forward pass of which only the last token's logits, or none, are wanted; {}
    where `model` has no such setting."""
    known = inspect.signature(type(causal_lm(model)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def chunks(model, tokens: int) -> list[slice]:
    """Slices of `tokens` rows whose logits have about `ELEMENTS` elements each."""
    rows = max(1, ELEMENTS // _vocabulary(model))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _vocabulary(model) -> int:
    return causal_lm(model).config.get_text_config().vocab_size


def logits_of(model, routing: Routing, ids: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """Runs `model` on ids `[1, s]` and returns a function from a slice of rows to their logits
    `[rows, V]`.

    Call the function under the adapters and the autocast of the pass itself: the head may have
    adapters too.
    """
    if len(chunks(model, ids.shape[1])) <= 1:
        logits = model(input_ids=ids, use_cache=False).logits[0]
        return lambda rows: logits[rows]
    outputs, thread = [], threading.get_ident()

    def keep(module, arguments, output):
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = routing.decoder.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False, **last_only(model))
    finally:
        handle.remove()
    replay = _Replay(outputs[-1])
    head = _with_decoder(causal_lm(model), routing.decoder, replay)

    def rows_of(rows: slice) -> torch.Tensor:
        replay.rows = rows
        return type(head).forward(head, input_ids=ids[:, rows], use_cache=False).logits[0]

    return rows_of


class _Replay(nn.Module):
    """Stands for a decoder that has run: gives some rows of its output again."""

    def __init__(self, output):
        super().__init__()
        self.output, self.rows = output, slice(None)

    def forward(self, *arguments, **options):
        if isinstance(self.output, tuple):
            return (self.output[0][:, self.rows], *self.output[1:])
        return dataclasses.replace(self.output,
                                   last_hidden_state=self.output.last_hidden_state[:, self.rows])


def _with_decoder(causal: nn.Module, decoder: nn.Module, stand_in: nn.Module) -> nn.Module:
    """`causal` with `stand_in` for its decoder. Both share every other part; `causal` itself is not
    touched, since another thread may be using it."""
    path = next(name for name, module in causal.named_modules() if module is decoder).split(".")
    head = parent = _shallow(causal)
    for name in path[:-1]:
        parent._modules[name] = parent = _shallow(parent._modules[name])
    parent._modules[path[-1]] = stand_in
    return head


def _shallow(module: nn.Module) -> nn.Module:
    copied = module.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    # put there by offloading, and bound to the original
    copied.__dict__.pop("forward", None)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied
