"""Budgets that are hit: the controller in training, the calibration after it, and the dial.

    with dlr.budget(model, skip=0.3):
        model.generate(...)

At the optimum of "least loss at a given mean gate", a unit runs exactly where its worth exceeds one
price, the dual variable of the budget. So the gate's threshold is that dual variable, and the
controller moves it by the skip missed.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

from dlr.routing.decoder import routing_of

LEAST_SLOPE = 0.05         # no step is longer than twenty logits a unit of missed skip


@dataclass
class Controller:
    """Dual ascent on the threshold, by a share `rate` of the missed skip a step.

    The step is the miss over the slope of the skip ratio, which the plan itself tells (Newton's
    step). In logit units alone a step is too short: nothing in the loss holds the logits' common
    level, a router that learns lifts it, and the threshold follows by one step's lift too late
    (some points of skip while the learning rate is high).
    """
    target: float
    rate: float = 1.0
    ramp_steps: int = 0

    def goal(self, step: int) -> float:
        """The skip ratio asked for at `step`: from 0, linearly, to the target."""
        reached = min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        return self.target * reached

    def update(self, threshold: float, measured_skip: float, step: int,
               slope: float = 1.0) -> float:
        """The next threshold, higher after too little skip; `slope`: d skip / d threshold."""
        return threshold + self.rate * (self.goal(step) - measured_skip) / max(slope, LEAST_SLOPE)


def threshold_for(logits: torch.Tensor, target_skip: float, forced: int = 0) -> float:
    """The threshold that skips as near `target_skip` of `logits` `[n, U]` as their values allow.

    `forced` counts gates outside `logits` that always run (kept first tokens), a part of the ratio.

    Raises:
        ValueError: no logits, a target outside 0 to 1, or more than the forced gates leave.
    """
    if not 0.0 <= target_skip <= 1.0:
        raise ValueError(f"target_skip={target_skip} must lie between 0 and 1.")
    values = logits.detach().flatten().double().sort().values
    if not len(values):
        raise ValueError("There are no router logits to calibrate on; give at least one document.")
    skipped = round(target_skip * (len(values) + forced))
    if skipped > len(values):
        raise ValueError(f"A skip ratio of {target_skip} cannot be reached: {forced} of "
                         f"{forced + len(values)} gates always run.")
    return _between(values, skipped)


def _between(values: torch.Tensor, skipped: int) -> float:
    """A threshold with `skipped` of the sorted `values` at or below it."""
    if skipped == 0:
        return float(values[0]) - 1.0
    if skipped == len(values):
        return float(values[-1]) + 1.0
    return float((values[skipped - 1] + values[skipped]) / 2)


# skip ratios the calibration curve is stored at
DIAL = tuple(percent / 100 for percent in range(81))


def calibration_curve(logits: torch.Tensor, forced: int = 0) -> list[float]:
    """The threshold for each skip of DIAL, never falling; arguments as in `threshold_for`."""
    values = logits.detach().flatten().double().sort().values
    total = logits.numel() + forced
    return [_between(values, min(round(skip * total), len(values))) for skip in DIAL]


def threshold_at(curve: list[float], skip: float) -> float:
    """The threshold for `skip` on a calibration curve; at 0 nothing is skipped, on any text.

    Raises:
        ValueError: `skip` lies outside the dial, or there is no curve.
    """
    if not curve:
        raise ValueError("This router has no calibration curve, so its budget cannot be dialled: "
                         "calibrate it first (dlr.calibrate).")
    if not 0.0 <= skip <= DIAL[-1]:
        raise ValueError(f"skip={skip} is outside the dial: give a ratio from 0 to {DIAL[-1]}.")
    if skip == 0.0:
        return -math.inf
    place = skip * 100
    low = min(int(place), len(DIAL) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])


@contextlib.contextmanager
def budget(model, skip: float):
    """Dials another skip ratio for the duration, in this thread; yields the routing handle.

    `routing.threshold` is then the threshold in force. That of `routing.calibration` stays, which
    `save_pretrained` writes.

    Args:
        skip: skip ratio asked for, 0 to 0.8. 0 keeps every layer.

    Raises:
        NotRoutable: no router is attached.
        ValueError: `skip` is outside the dial, or the router was never calibrated.
    """
    routing = routing_of(model)
    with routing.at(threshold=threshold_at(routing.calibration.curve, skip)):
        yield routing
