"""One benchmark in several processes, as torchrun and `accelerate launch` start them.

Every process runs the harness as if it were alone, so that all make the same prompts and all know
every answer. What they share is the work of answering. The first one writes and speaks.
"""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dlr.progress import tqdm

PATIENCE = timedelta(weeks=1)       # for the slowest process; where one dies, the launcher ends all


def processes() -> PartialState:
    """The processes there are (one, unless a launcher started this), each on a card of its own."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def is_first() -> bool:
    return processes().is_main_process


def say_first(*words, **options) -> None:
    if is_first():
        print(*words, **options)


def from_first(make):
    """What `make()` gives in the first process, in every one: none may decide otherwise."""
    return broadcast_object_list([make() if is_first() else None])[0]


def dealt(batches: list, answer, describe: str, quiet: bool = False) -> list:
    """`answer(batch)` of every batch, in order; each process answers every n-th and gets all.

    Whole batches are dealt, so that a number does not depend on how many processes there are.

    Raises:
        RuntimeError: another process failed; the one that did raises its own error.
    """
    mine = range(processes().process_index, len(batches), processes().num_processes)
    answers, failure = {}, None
    hidden = not is_first() or quiet and len(mine) < 20
    try:
        for place in tqdm(mine, desc=describe, unit="batch", disable=hidden):
            answers[place] = answer(batches[place])
    except Exception as error:            # the others wait for these answers
        failure = error
    told = f"{type(failure).__name__}: {failure}" if failure else None
    parts = gather_object([(answers, told)])
    if failure:
        raise failure
    for process, (part, told) in enumerate(parts):
        if told:
            raise RuntimeError(f"Process {process} of {len(parts)} failed: {told}")
        answers |= part
    return [answers[place] for place in range(len(batches))]
