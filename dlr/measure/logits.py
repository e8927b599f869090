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

from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.weights import causal_lm

# Logits held at a time: 50 MB in float32. Blocks above 32 MB go back to the system at once; smaller
# ones would stay in the C library's heap, which then grows all the same.
ELEMENTS = 3 * 2**22
# On an accelerator, where a few rows at a time leave most of it idle: a part of the free memory, in
# float32 with as many copies again, and at most 1 GB.
SHARE, MOST = 64, 2**28


def elements_at_once(device: torch.device) -> int:
    """How many logits are held at a time on a device."""
    if device.type != "cuda":
        return ELEMENTS
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(ELEMENTS, free // SHARE), MOST)


def last_only(model) -> dict:
    """Arguments for a forward pass that makes the last logits only; {} where `model` has none."""
    arguments = inspect.signature(type(causal_lm(model)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}


def chunks(model, tokens: int, texts: int = 1) -> list[slice]:
    """Slices of `tokens` places, whose logits in `texts` texts are what `elements_at_once` allows.
    """
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    step = max(1, elements_at_once(device_of(model)) // (vocabulary * texts))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def logits_of(model, routing: Routing, ids: torch.Tensor, mask: torch.Tensor | None = None,
              run: Callable | None = None) -> Callable[[slice], torch.Tensor]:
    """Runs `model` on ids `[b, s]`; returns a function from a slice of n places to their logits.

    Call the function, which returns `[b, n, V]`, under the adapters and autocast of the pass
    itself: the head may have adapters too (`head_is_adapted`).

    Args:
        run: called in place of `model`: what wraps it where several processes train it.
    """
    run = run or model
    asked = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if len(chunks(model, ids.shape[1], len(ids))) <= 1:
        logits = run(**asked).logits
        return lambda places: logits[:, places]
    outputs = []
    thread = threading.get_ident()

    def keep(module, arguments, output):
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = routing.decoder.register_forward_hook(keep)
    try:
        run(**asked, **last_only(model))
    finally:
        handle.remove()
    replay = _Replay(outputs[-1])
    head = _with_decoder(causal_lm(model), routing.decoder, replay)

    def logits_at(places: slice) -> torch.Tensor:
        replay.places = places
        return type(head).forward(head, input_ids=ids[:, places], use_cache=False).logits

    return logits_at


def head_is_adapted(model, routing: Routing) -> bool:
    """Whether adapters lie outside the decoder, where they change logits after it has run."""
    inside = set(routing.decoder.modules())
    return any(hasattr(module, "adapter_layer_names") and module not in inside
               for module in causal_lm(model).modules())


class _Replay(nn.Module):
    """Stands for a decoder that has run: gives its output at some places again."""

    def __init__(self, output):
        super().__init__()
        self.output, self.places = output, slice(None)

    def forward(self, *arguments, **options):
        if isinstance(self.output, tuple):
            return (self.output[0][:, self.places], *self.output[1:])
        return dataclasses.replace(self.output,
                                   last_hidden_state=self.output.last_hidden_state[:, self.places])


def _with_decoder(causal: nn.Module, decoder: nn.Module, stand_in: nn.Module) -> nn.Module:
    """A shallow copy of `causal` with another decoder: other threads may be using `causal`."""
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
