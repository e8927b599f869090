"""The end of each optimizer step: what is logged, what is shown, and whether the training stops."""

from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback

from dlr.progress import tqdm
from dlr.runs import write_atomically

# Of log.csv; the keep rate of each unit follows. `val_ce` and `val_skip` are there at steps at
# which held-out text was measured; `rows` counts the sequences of one process's pass.
LOG_COLUMNS = ("step", "ce", "kd", "budget", "skip", "goal", "threshold", "gate_entropy",
               "temperature", "lr", "tokens_per_second", "val_ce", "val_skip", "rows")


def write_log(history: list[dict], path: Path) -> None:
    """Writes Trainer's own history of steps, which a resumed run has from its checkpoint."""
    rows = [row for row in history if "ce" in row]
    columns = [*LOG_COLUMNS, *(name for name in rows[-1] if name.startswith("keep_"))]
    log = pd.DataFrame(rows).reindex(columns=columns)
    write_atomically(path, log.to_csv(index=False, float_format="%.6g"))


class StepEnd(TrainerCallback):
    """The trainer's own end of each optimizer step, and the progress bar."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.bar, self.validated = None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:      # each process draws gates of its own; the data has its order
            torch.manual_seed(args.seed + args.process_index)
        self.on_train_end(args, state, control)                # of a try that did not fit
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training",
                        unit="step", disable=not state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        row = self.trainer.step_done(state.global_step)
        self._show(ce=f"{row['ce']:.3f}", skip=f"{row['skip']:.0%}")
        self.bar.update()
        is_last = state.global_step == state.max_steps         # is kept for a run's next variants
        control.should_save |= is_last or self.trainer.is_stopping
        control.should_training_stop |= self.trainer.is_stopping

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._show(val_ce=f"{metrics['eval_val_ce']:.3f}")

    def _show(self, **values):
        self.validated |= {name: value for name, value in values.items() if name == "val_ce"}
        self.bar.set_postfix(**values | self.validated, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
