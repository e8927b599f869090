"""Budgets that are hit: the controller used in training and the calibration that follows it.

At the optimum of "least loss at a given mean gate", a unit runs exactly where its worth exceeds one price, the dual
variable of the budget. So the gate's threshold is that dual variable, and the controller moves it by the skip missed.
"""

from dataclasses import dataclass

import torch


@dataclass
class Controller:
    """Dual ascent on the threshold. `rate` is in logit units a unit of missed skip."""
    target: float
    rate: float = 1.0
    ramp_steps: int = 0

    def goal(self, step: int) -> float:
        """The skip ratio asked for at `step`: from 0, linearly, to the target."""
        return self.target * min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else self.target

    def update(self, threshold: float, measured_skip: float, step: int) -> float:
        """The next threshold; it rises where too little was skipped."""
        return threshold + self.rate * (self.goal(step) - measured_skip)


def calibrate(logits: torch.Tensor, target_skip: float, forced: int = 0) -> float:
    """The threshold at which the skip ratio over `logits` `[n, U]` is as near `target_skip` as their values allow.

    `forced` counts gates outside `logits` that always run (kept first tokens); they are part of the ratio.

    Raises:
        ValueError: no logits, a target outside 0 to 1, or more skipping asked than the forced gates leave.
    """
    if not 0.0 <= target_skip <= 1.0:
        raise ValueError(f"target_skip={target_skip} must lie between 0 and 1.")
    values = logits.detach().flatten().double().sort().values
    if not len(values):
        raise ValueError("There are no router logits to calibrate on; give at least one document.")
    skipped = round(target_skip * (len(values) + forced))
    if skipped > len(values):
        raise ValueError(f"A skip ratio of {target_skip} cannot be reached: {forced} of {forced + len(values)} gates "
                         "always run.")
    if skipped == 0:
        return float(values[0]) - 1.0
    if skipped == len(values):
        return float(values[-1]) + 1.0
    return float((values[skipped - 1] + values[skipped]) / 2)
