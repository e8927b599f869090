"""The checkpoints that a training leaves: its last state, and the best where that is another."""

from collections.abc import Iterator
from pathlib import Path

from dlr.base.checkpoint import save_control
from dlr.routing.handle import Routing
from dlr.train.resume import BEST, STATE, finished, load_state, steps_of


def kept_states(model, routing: Routing, folder: Path, steps: int) -> Iterator[str]:
    """Names of the checkpoints to make in a variant's `folder`, each with its weights in the model.

    'best' comes first, where an earlier step than the last had the least `val_ce`; then
    'checkpoint', the last, which is what results are measured on.
    """
    output = folder / "trainer"
    best, end = output / BEST, finished(output, steps)
    if end is not None and (best / STATE).is_file() and steps_of(best) < steps_of(end):
        load_state(model, routing, best)
        yield BEST
        load_state(model, routing, end)
    yield "checkpoint"


def keep_control(model, routing: Routing, folder: Path, steps: int, *of) -> None:
    """Saves a control's checkpoints; `of` is what `save_control` is told of its plan."""
    for name in kept_states(model, routing, folder, steps):
        save_control(model, routing, folder / name, *of)
