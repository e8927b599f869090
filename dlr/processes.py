"""Several processes of one training: who is who, what each does, and what all of them agree on.

A launcher (torchrun, accelerate launch) starts them. In one process all of this costs nothing.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

# How long a process waits for the others: some prepare longer than the usual ten minutes.
PATIENCE = timedelta(hours=3)


def begin() -> None:
    """Joins the processes that a launcher started, where one did.

    Raises:
        ValueError: accelerate was asked for CPUs, where it starts one process, however many it was
            asked for, and says nothing.
    """
    if "WORLD_SIZE" in os.environ:
        from accelerate import PartialState  # takes a second to import
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    elif os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        raise ValueError("accelerate launch --cpu starts one process, whatever --num_processes is. "
                         "Use torchrun --nproc-per-node N -m dlr ..., or accelerate launch "
                         "--multi_gpu --num_processes N -m dlr ..., which works without a GPU; for "
                         "one process, python -m dlr ...")


def end() -> None:
    """Leaves the others."""
    if count() > 1:
        dist.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The place of this one among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def wait() -> None:
    """Returns once every process is here."""
    if count() > 1:
        dist.barrier()


def agreed(value):
    """The first process's `value`, in all of them."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value) -> list:
    """Every process's `value`, by rank."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def dealt(parts: list, make: Callable) -> Iterable:
    """`make(part)` of each part, in order; each process makes its share and has all in the end."""
    if count() == 1:
        return map(make, parts)
    shares = gathered([make(part) for part in parts[rank()::count()]])
    return [shares[place % count()][place // count()] for place in range(len(parts))]
