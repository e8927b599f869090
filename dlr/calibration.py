"""Budgets that are hit: the controller used in training, the calibration that follows it, and the dial at inference.

    with dlr.budget(model, skip=0.3):
        model.generate(...)

At the optimum of "least loss at a given mean gate", a unit runs exactly where its worth exceeds one price, the dual
variable of the budget. So the gate's threshold is that dual variable, and the controller moves it by the skip missed.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

from dlr.decoder import routing_of

LEAST_SLOPE = 0.05         # no step is longer than twenty logits a unit of missed skip


@dataclass
class Controller:
    """Dual ascent on the threshold. `rate` is the share of the missed skip that one step makes good.

    The step is the miss over the slope of the skip ratio, which the plan itself tells (Newton's step). In logit units alone
    a step is too short: nothing in the loss holds the logits' common level, a router that learns lifts it, and the
    threshold follows by one step's lift too late (some points of skip while the learning rate is high).
    """
    target: float
    rate: float = 1.0
    ramp_steps: int = 0

    def goal(self, step: int) -> float:
        """The skip ratio asked for at `step`: from 0, linearly, to the target."""
        return self.target * min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else self.target

    def update(self, threshold: float, measured_skip: float, step: int, slope: float = 1.0) -> float:
        """The next threshold; it rises where too little was skipped. `slope` is d skip / d threshold where it stands."""
        return threshold + self.rate * (self.goal(step) - measured_skip) / max(slope, LEAST_SLOPE)


def threshold_for(logits: torch.Tensor, target_skip: float, forced: int = 0) -> float:
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
    return _between(values, skipped)


def _between(values: torch.Tensor, skipped: int) -> float:
    """A threshold with `skipped` of the sorted `values` at or below it."""
    if skipped == 0:
        return float(values[0]) - 1.0
    if skipped == len(values):
        return float(values[-1]) + 1.0
    return float((values[skipped - 1] + values[skipped]) / 2)


DIAL = tuple(percent / 100 for percent in range(81))       # skip ratios the calibration curve is stored at


def calibration_curve(logits: torch.Tensor, forced: int = 0) -> list[float]:
    """The threshold for each skip ratio of DIAL over `logits` `[n, U]`; `forced` as in `threshold_for`. Never falls."""
    values, total = logits.detach().flatten().double().sort().values, logits.numel() + forced
    return [_between(values, min(round(skip * total), len(values))) for skip in DIAL]


def threshold_at(curve: list[float], skip: float) -> float:
    """The threshold for `skip`, between two marks of a calibration curve; at 0 nothing is skipped, on any text.

    Raises:
        ValueError: `skip` lies outside the dial, or there is no curve.
    """
    if not curve:
        raise ValueError("This router has no calibration curve, so its budget cannot be dialled: calibrate it first "
                         "(dlr.calibrate).")
    if not 0.0 <= skip <= DIAL[-1]:
        raise ValueError(f"skip={skip} is outside the dial: give a ratio from 0 to {DIAL[-1]}.")
    if skip == 0.0:
        return -math.inf
    place = skip * 100
    low = min(int(place), len(DIAL) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])


@contextlib.contextmanager
def budget(model, skip: float):
    """Moves the router's threshold along its calibration curve for the duration, in this thread; yields the routing handle.

    `routing.threshold` is the threshold in force; `routing.calibration.threshold`, which `save_pretrained` writes, stays.

    Args:
        skip: skip ratio asked for, 0 to 0.8. 0 keeps every layer.

    Raises:
        NotRoutable: no router is attached; ValueError: `skip` is outside the dial, or the router was never calibrated.
    """
    routing = routing_of(model)
    with routing.at(threshold=threshold_at(routing.calibration.curve, skip)):
        yield routing
