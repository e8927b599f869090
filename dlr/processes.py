"""Several processes of one training or evaluation: who does what, and what all of them agree on.

A launcher (torchrun, accelerate launch) starts them. In one process all of this costs nothing.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

# How long a process waits for the others. Where one dies, the launcher ends all.
PATIENCE = timedelta(weeks=1)


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


def say(*words) -> None:
    """Prints in the first process."""
    if is_first():
        print(*words, flush=True)


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


def dealt(parts: list, make: Callable, show: Callable = iter) -> Iterable:
    """`make(part)` of each part, in order; each process makes every n-th and has all in the end.

    One process makes the parts as they are asked for.

    Args:
        show: gives a list's parts with a progress bar; called on this process's own.

    Raises:
        RuntimeError: another process failed; the one that did raises its own error.
    """
    if count() == 1:
        return map(make, show(parts))
    made, failure = [], None
    try:
        made = [make(part) for part in show(parts[rank()::count()])]
    except Exception as error:            # the others wait for these parts
        failure = error
    shares = gathered((made, failure and f"{type(failure).__name__}: {failure}"))
    if failure:
        raise failure
    for process, (_, told) in enumerate(shares):
        if told:
            raise RuntimeError(f"Process {process} of {count()} failed: {told}")
    return [shares[place % count()][0][place // count()] for place in range(len(parts))]
