"""Cross-entropy and distillation of a training step, without the logits of the whole batch.

A batch's logits under a vocabulary of 152,000 are the largest tensors of a step by far. The decoder
runs once for the student and once for the teacher; the head, the cross-entropy and the divergence
follow on a few rows at a time, and the backward pass computes them again.

Notation: b batch, s sequence, n predicted positions.
"""

import contextlib
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from dlr.measure.likelihood import cross_entropy, frozen_base, kl_to_teacher, predicted
from dlr.measure.logits import chunks, head_is_adapted, logits_of
from dlr.routing.handle import Routing
from dlr.routing.policy import Policy

Losses = tuple[torch.Tensor, torch.Tensor | None]


def losses(model, routing: Routing, inputs: dict[str, torch.Tensor], policy: Policy | None,
           temperature: float | None, run: Callable | None = None) -> Losses:
    """Cross-entropy and KL from the frozen base, `[n]` each in nats, both with gradients.

    Args:
        inputs: input_ids and attention_mask `[b, s]`.
        policy: that the student runs under.
        temperature: of the distillation. None: no teacher runs, and the KL is None.
        run: called in place of `model`: what wraps it where several processes train it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real, teacher = mask.bool(), None
    # The student runs first: a sharded model whose first pass finds no trainable weight (the
    # teacher's has none) notes no number format for gradients. `routing.plan` stays the student's.
    with routing.using(policy):
        student = logits_of(model, routing, ids, mask, run)
    if temperature is not None:
        with frozen_base(model, routing):
            teacher = logits_of(model, routing, ids, mask)
    frozen = frozen_base if head_is_adapted(model, routing) else _no_gradients

    def part(places: slice) -> Losses:
        window = slice(places.start, places.stop + 1)      # with the token after the last place
        logits = student(window)
        ce = cross_entropy(logits, ids[:, window], real[:, window])
        if teacher is None:
            return ce, None
        with frozen(model, routing):
            goal = teacher(window)
        return ce, kl_to_teacher(logits, goal, real[:, window], temperature)

    places = chunks(model, ids.shape[1], len(ids))
    found = [part(place) if len(places) == 1 else checkpoint(part, place, use_reentrant=False)
             for place in places if predicted(real)[:, place].any()]
    ce, kd = zip(*found)
    return torch.cat(ce), None if teacher is None else torch.cat(kd)


@contextlib.contextmanager
def _no_gradients(model, routing):
    """In the place of `frozen_base` where the head is the base's own, adapters or not."""
    with torch.no_grad():
        yield model
