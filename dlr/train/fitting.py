"""A batch that does not fit in memory: passes of fewer sequences, more of which make up the batch.

Trainer's own way (`auto_find_batch_size`) lets the whole batch shrink, so that it would be another
training.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import find_executable_batch_size
from transformers import Trainer

from dlr.processes import count
from dlr.routing.handle import Routing
from dlr.routing.router import ROUTER_NAME


class Start:
    """What a training begins with, kept in the processor's memory."""

    def __init__(self, model: torch.nn.Module, routing: Routing):
        self.model, self.routing = model, routing
        self.weights = {name: parameter.detach().to("cpu", copy=True)
                        for name, parameter in model.named_parameters()
                        if parameter.requires_grad or ROUTER_NAME in name}
        self.calibration = replace(routing.calibration)
        self.random = torch.get_rng_state()
        self.random_on_cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Puts weights, calibration and random numbers back."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.weights[name])
                    parameter.grad = None
        self.routing.calibration = replace(self.calibration)
        torch.set_rng_state(self.random)
        torch.cuda.set_rng_state_all(self.random_on_cards)


def fewer_rows(rows: int) -> int:
    """The most sequences below `rows` of which a whole number of passes makes up as many."""
    return next(part for part in range(rows // 2, 0, -1) if rows % part == 0)


def train_as_fits(trainer: Trainer, routing: Routing, newest: Callable[[], Path | None],
                  begin_again: Callable[[], None]) -> None:
    """Trains. Where memory runs out, the training goes on in smaller passes, as is said once each.

    Args:
        newest: the checkpoint to go on from; None: there is none, and training begins.
        begin_again: is called before another try.

    Raises:
        ValueError: one sequence does not fit; or one of several processes has no room, which cannot
            go back without the others.
    """
    arguments = trainer.args
    start = Start(trainer.model, routing) if count() == 1 else None

    def smaller() -> int:
        rows, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        if rows == 1 or start is None:
            raise ValueError(
                f"A pass of {rows} sequence(s) does not fit in the memory of one device. "
                + ("Set batch_size to half and accumulation to twice what they are. "
                   if rows > 1 else "")
                + "gradient_checkpointing=true, a smaller seq_len and load_in_4bit=true need less; "
                "python -m dlr plan says what fits.")
        part = fewer_rows(rows)
        arguments.per_device_train_batch_size = trainer._train_batch_size = part
        arguments.gradient_accumulation_steps = passes * rows // part
        warnings.warn(f"A pass of {rows} sequences does not fit in memory: from here on a pass "
                      f"takes {part}, and a step {arguments.gradient_accumulation_steps} passes. "
                      "The whole batch stays the same.", stacklevel=2)
        return part

    def attempt(rows: int) -> None:
        last = newest()
        if rows != first:
            start.restore()
            begin_again()
        trainer.train(resume_from_checkpoint=last and str(last))

    first = arguments.per_device_train_batch_size
    find_executable_batch_size(attempt, first, smaller)()
