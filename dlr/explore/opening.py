"""What the explorer opens: a checkpoint, or a base model with the router that was made for it."""

import contextlib
import math
import warnings
from pathlib import Path

from transformers.utils import logging as bars

from dlr.base.find import checkpoints, label_of, router_for
from dlr.base.models import load_base
from dlr.base.opened import load
from dlr.routing.attach import attach
from dlr.routing.config import Calibration
from dlr.runs import project_root


def open_routed(checkpoint: str | Path | None, base: str | None, **loading) -> tuple:
    """(model, tokenizer, folder or None, name, note); arguments and errors: `session.Session`."""
    if checkpoint is None and base is not None:
        checkpoint = router_for(base)
    with _quiet() as said:
        if checkpoint is None and base is not None:
            model, tokenizer = load_base(base, **loading)
            attach(model).calibration = Calibration(-math.inf, 0.0)
            folder, name = None, f"{base}, no router"
            said.append(f"There is no router for {base} yet: at budget 0 every layer runs, at "
                        "others an untrained router decides.")
        else:
            if base is not None:
                loading["model"] = base
            opened = load(checkpoint, variant="routed", say=lambda words: None, **loading)
            model, tokenizer, _ = opened
            folder, name = opened.folder, label_of(opened.folder)
    note = " ".join(said)
    return model, tokenizer, folder, name, note.replace(str(folder), name) if folder else note


def sources(name: str, source: tuple) -> dict[str, tuple]:
    """Label to (checkpoint, base): what is open, and every checkpoint, on the base it names."""
    return {name: source} | {label: (folder, None) for label, folder in checkpoints().items()
                             if label != name}


@contextlib.contextmanager
def _quiet():
    """Yields a list that afterwards holds this project's own warnings, for the view. Other warnings
    are passed on. transformers' progress bar, which would stay on the page, is off meanwhile."""
    said: list[str] = []
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield said
    finally:
        if shown:
            bars.enable_progress_bar()
    for warning in caught:
        if project_root() / "dlr" in Path(warning.filename).resolve().parents:
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename,
                                   warning.lineno)
