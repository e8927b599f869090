"""Next-token cross-entropy, the divergence from a teacher, and the frozen base that is the teacher.

Notation: b batch, s sequence, V vocabulary, n predicted positions. Padding never counts.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dlr.base.adapters import without_adapters

ROWS = 1024      # positions held in float32 at a time: 152k x 1024 x 4 bytes = 0.6 GB of logits


def predicted(real: torch.Tensor) -> torch.Tensor:
    """`[b, s-1]` bool: positions whose next token is real."""
    return real[:, 1:] & real[:, :-1]


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of each predicted position, `[n]` in nats.

    logits are `[b, s, V]`, ids and real `[b, s]`.
    """
    mask = predicted(real)
    rows, targets = logits[:, :-1][mask], ids[:, 1:][mask]
    parts = [F.cross_entropy(rows[i:i + ROWS].float(), targets[i:i + ROWS], reduction="none")
             for i in range(0, len(rows), ROWS)]
    return torch.cat(parts)


def _kl_rows(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    log_q = F.log_softmax(student.float() / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_to_teacher(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor,
                  temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of predicted positions, `[n]` nats times the squared temperature.

    As in Hinton et al. 2015. The backward pass computes rows again, so that no float32 copy
    `[b, s, V]` is held.
    """
    mask = predicted(real)
    rows, goal = student[:, :-1][mask], teacher[:, :-1][mask]

    def part(i: int) -> torch.Tensor:
        inputs = rows[i:i + ROWS], goal[i:i + ROWS], temperature
        if rows.requires_grad:
            return checkpoint(_kl_rows, *inputs, use_reentrant=False)
        return _kl_rows(*inputs)
    return torch.cat([part(i) for i in range(0, len(rows), ROWS)]) * temperature**2


@contextlib.contextmanager
def frozen_base(model, routing):
    """The base model itself, in place: adapters, router and dropout off, and no gradients.

    Raises:
        ValueError: an adapter trains the base's own biases, or lies in the model unknown to it.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_adapters(model, routing), routing.disabled():
            yield model
    finally:
        model.train(training)
