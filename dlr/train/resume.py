"""Which checkpoint of a training is one to go on from, or to take as its end."""

import json
import os
from pathlib import Path

from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from dlr.base.folder import CONFIG, WEIGHTS
from dlr.processes import is_first
from dlr.routing.config import Calibration
from dlr.routing.handle import Routing
from dlr.runs import write_atomically

NOTES = "start.json"                  # what was noted before the first step, beside checkpoints
STATE = "trainer_state.json"          # the last file that Trainer's first process writes
BEST = "best"                         # the state of least val_ce, beside checkpoints


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]


def ended_early(checkpoint: Path) -> bool:
    """Whether patience (see `validation.Patience`) ended a training with this checkpoint."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    waited = state["stateful_callbacks"].get("Patience")
    return waited is not None and (waited["attributes"]["early_stopping_patience_counter"]
                                   >= waited["args"]["early_stopping_patience"])


def finished(output: Path, steps: int) -> Path | None:
    """The checkpoint in `output` that holds all `steps` of a training, or its early end, or None.

    The first process has then written all that was trained, and nobody goes on: what other
    processes write into a checkpoint is not asked for.
    """
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    is_end = last is not None and (Path(last) / STATE).is_file() and (
        steps_of(Path(last)) >= steps or ended_early(Path(last)))
    return Path(last) if is_end else None


def newest(output: Path, processes: int) -> Path | None:
    """The newest checkpoint in `output` to go on from; those cut short by a kill are renamed.

    Raises:
        ValueError: it was written by another number of processes.
    """
    while last := get_last_checkpoint(str(output)) if output.is_dir() else None:
        if whole(Path(last), processes):
            return Path(last)
        os.rename(last, output / f"broken-{Path(last).name}")
    return None


def whole(checkpoint: Path, processes: int) -> bool:
    """Whether every process has written its part of a checkpoint: the state file comes before some.

    Raises:
        ValueError: another number of processes wrote the parts, so this would be another run.
    """
    if not (checkpoint / STATE).is_file():
        return False
    needed = {f"rng_state_{rank}.pth" for rank in range(processes)}
    if processes == 1:
        needed = {"rng_state.pth"}
    written = {path.name for path in checkpoint.glob("rng_state*.pth")}
    if written - needed:
        raise ValueError(f"The checkpoint {checkpoint.name!r} in {str(checkpoint.parent)!r} was "
                         f"written by {len(written)} process(es) and this run has {processes}: go "
                         "on with as many, or remove that folder to begin again.")
    return written == needed


def keep_notes(output: Path, notes: dict) -> None:
    """Keeps what was noted of a training's start for those who find the training done."""
    if notes and is_first():
        write_atomically(output / NOTES, json.dumps(notes))


def read_notes(output: Path) -> dict:
    """What `keep_notes` kept; {} where that was nothing."""
    path = output / NOTES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_state(model, routing: Routing, folder: Path) -> None:
    """Puts the adapter and the router that a training saved in `folder` into the model."""
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    load_router(routing, folder)


def load_router(routing: Routing, folder: Path) -> None:
    """Puts a saved router's weights and calibration into the one that is attached."""
    routing.router.load_weights(load_file(folder / WEIGHTS))
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    routing.calibration = Calibration(record["threshold"], record["calibrated_skip"],
                                      record["curve"])
